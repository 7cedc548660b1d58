"""Python calls in which a number made from sizes becomes a value, and not a size.

A factor has a meaning that a cut can keep: the mean over what is there, or a scale that is folded into weights. Which
of them it is the proof tells (`secateur.kinds.slices.meanings`). Everything else that a size can do to a tensor (an
offset, a threshold, a bound, a number to fill with) is another function at another size, also where the example does
not show it: what it comes from has to stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from secateur.structure.numbers import TrackedFloat, TrackedInt
from secateur.structure.provenance import is_literal
from secateur.structure.recorder import Recorder
from secateur.structure.trace import Args, Kwargs, Place, SizeUse

# Functions to which a whole number among the arguments is a value. Elsewhere it is a size, a place or a dimension.
OFFSETS = ("add", "sub", "subtract", "rsub")
THRESHOLDS = ("gt", "greater", "ge", "greater_equal", "lt", "less", "le", "less_equal", "eq", "ne", "not_equal",
              "clamp", "clip", "clamp_min", "clamp_max", "threshold", "hardtanh", "heaviside", "where", "maximum",
              "minimum", "fmax", "fmin", "isclose")  # fmt: skip
ROUNDED = ("floordiv", "floor_divide", "mod", "remainder", "fmod")
CURVED = ("pow", "float_power", "logaddexp", "xlogy", "atan2", "copysign", "nan_to_num", "elu", "leaky_relu", "lerp")
FILLED = ("fill", "masked_fill", "index_fill", "full_like", "setitem", "fill_diagonal")
VALUES = frozenset([*OFFSETS, *THRESHOLDS, *ROUNDED, *CURVED, *FILLED])
FACTORS = frozenset(["mul", "multiply", "div", "divide", "true_divide", "truediv", "rtruediv", "rdiv",
                     "scaled_dot_product_attention", "baddbmm", "addmm", "addbmm", "addmv", "addr", "addcmul",
                     "addcdiv"])  # fmt: skip
# A fraction that becomes a tensor is judged where that tensor is used.
MADE = frozenset(["tensor", "as_tensor", "scalar_tensor", "asarray", "new_tensor", "full", "new_full"])


def watch_values(recorder: Recorder, name: str, args: Args, kwargs: Kwargs) -> None:
    """Note the numbers of a call that are values, other than factors, and made from sizes."""
    bare = name.strip("_")
    if name.startswith("__") and bare[:1] in "ir" and bare[1:] in (*VALUES, *FACTORS):
        bare = bare[1:]
    if bare in MADE or not any(isinstance(tensor, Tensor) for tensor in (*args, *kwargs.values())):
        return
    if bare in FACTORS:
        for number in _numbers((*args, *kwargs.values())):
            recorder.trace.factors.extend(_uses(recorder, bare, number))
        return
    whole = bare in VALUES
    for number in _numbers((*args, *kwargs.values())):
        if isinstance(number, TrackedFloat) or whole:
            _stays(recorder, bare, number)


def _numbers(values: Iterable[object]) -> Iterator[TrackedInt | TrackedFloat]:
    for value in values:
        if isinstance(value, (TrackedInt, TrackedFloat)):
            yield value
        elif type(value) in (list, tuple):
            yield from _numbers(value)  # type: ignore[arg-type]


def _stays(recorder: Recorder, name: str, number: TrackedInt | TrackedFloat) -> None:
    """What the number is made from has to stay, or the number itself where arithmetic of integers made it."""
    recorder.trace.size_uses.extend(_uses(recorder, f"a value ({name})", number))


def _uses(recorder: Recorder, op: str, number: TrackedInt | TrackedFloat) -> Iterator[SizeUse]:
    for size in number.sizes if isinstance(number, TrackedFloat) else (number,):
        if not is_literal(size.expr):
            here = recorder.here.place()
            yield SizeUse(size.expr, int.__int__(size), Place(op, here.module, here.where))
