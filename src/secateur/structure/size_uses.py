"""Python calls in which an integer fixes the size of a dimension.

Every handler ties each integer of its call to the dimension that it sizes. A literal locks the dimension at once; an
attribute or a size from `shape` becomes a `SizeUse`, which is checked and followed when the cut is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from secateur.structure.axes import Axis, Conflict, lock
from secateur.structure.provenance import TrackedInt, expr_of, is_literal
from secateur.structure.trace import Place, SizeUse
from secateur.types import Lock

if TYPE_CHECKING:
    from secateur.structure.capture import Recorder

Handler = Callable[["Recorder", tuple[Any, ...], dict[str, Any], Any], None]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for functions and methods by name."""

    def add(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return add


def tie(recorder: Recorder, value: Any, axis: Axis | None) -> None:
    """State that `value` is the size of `axis`."""
    if axis is None or axis.size == 1 or not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return
    here = recorder.place()
    place = Place(recorder.function, here.module, here.where)
    expr = expr_of(value)
    if is_literal(expr):
        hint = "replace the number by a size read from the tensor or by an attribute"
        lock(
            axis,
            Lock(f"the size {int(value)} is written in the code", place.op, place.module, place.where, hint),
        )
    elif int(value) == axis.size:
        recorder.trace.size_uses.append(SizeUse(expr, axis, place))


def watch(recorder: Recorder, value: Any) -> None:
    """State that `value` went into a computation, so that the cut model must compute it alike."""
    if isinstance(value, TrackedInt) and not is_literal(value.expr):
        here = recorder.place()
        recorder.trace.size_uses.append(
            SizeUse(value.expr, int(value), Place(recorder.function, here.module, here.where))
        )


def ints(values: Sequence[Any]) -> list[Any]:
    """Sizes given as separate arguments or as one sequence."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        return list(values[0])
    return list(values)


def _sizes(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    for name in names:
        if name in kwargs:
            return ints([kwargs[name]])
    return ints(args)


@handles("view", "reshape", "expand", "broadcast_to", "zeros", "ones", "empty", "rand", "randn", "new_zeros",
         "new_ones", "new_empty", "new_full", "full")  # fmt: skip
def result_sizes(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Each integer is the size of a dimension of the result."""
    rest = args[1:] if args and isinstance(args[0], Tensor) else args
    sizes = _sizes(rest, kwargs, "size", "shape")
    if recorder.function in ("full", "new_full"):
        sizes = ints(sizes[:1])
    if not isinstance(result, Tensor) or len(sizes) != result.dim():
        return
    recorder.made.clear()
    for value, axis in zip(sizes, recorder.axes(result), strict=True):
        tie(recorder, value, axis)


@handles("chunk", "tensor_split")
def chunk(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Pieces are equal, or a cut would move their borders."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if len({piece.shape[dim] for piece in result}) > 1:
        lock(recorder.axes(args[0])[dim], recorder.reason("cut into pieces of unequal size"))


@handles("pad")
def pad(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """The amounts must stay what they were."""
    for amount in args[1] if len(args) > 1 else kwargs["pad"]:
        watch(recorder, amount)


SCALARS = frozenset(
    ["add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "mul", "rmul", "imul", "multiply", "div", "rdiv",
     "truediv", "rtruediv", "itruediv", "true_divide", "divide", "pow", "rpow"]
)  # fmt: skip  # numbers that scale values: the cut model computes them anew, and its replay uses what it computed


def arithmetic(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Any other call: integers that came from sizes or attributes must keep their value."""
    if recorder.function.strip("_") in SCALARS:
        return
    for value in (*args, *kwargs.values()):
        if isinstance(value, TrackedInt):
            watch(recorder, value)


@handles("unflatten")
def unflatten(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Each integer is one factor of the dimension."""
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = list(args[2] if len(args) > 2 else kwargs["sizes"])
    start = dim % args[0].dim()
    for value, axis in zip(sizes, recorder.axes(result)[start : start + len(sizes)], strict=True):
        tie(recorder, value, axis)


@handles("repeat", "tile")
def repeat(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Each integer counts the copies of a dimension."""
    times = _sizes(args[1:], kwargs, "repeats", "dims")
    for value, axis in zip(reversed(times), reversed(recorder.axes(result)), strict=False):
        if 1 < value < axis.size:
            tie(recorder, value, _factor(recorder, axis, int(value), outer=True))
        elif value > 1:
            tie(recorder, value, axis)


@handles("repeat_interleave")
def repeat_interleave(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """The integer counts the copies of each position."""
    value = args[1] if len(args) > 1 else kwargs.get("repeats")
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if isinstance(value, int) and isinstance(dim, int) and value > 1:
        tie(recorder, value, _factor(recorder, recorder.axes(result)[dim], int(value), outer=False))


def _factor(recorder: Recorder, axis: Axis, count: int, *, outer: bool) -> Axis | None:
    try:
        if outer:
            return recorder.space.split_product(axis, count)[0]
        return recorder.space.split_product(axis, axis.size // count)[1]
    except Conflict:
        return axis


@handles("split", "split_with_sizes", "tensor_split")
def split(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Integers are the sizes of the pieces; `tensor_split` counts them."""
    sizes: Any = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if recorder.function == "tensor_split":
        return
    pieces = [recorder.axes(piece)[dim] for piece in result]
    if len(pieces) == 1:
        return
    wanted = [sizes] * len(pieces) if isinstance(sizes, int) else list(sizes)
    for value, axis in zip(wanted, pieces, strict=True):
        if axis.size == int(value):
            tie(recorder, value, axis)


@handles("narrow")
def narrow(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Start and length of an interval."""
    dim, start, length = args[1:4] if len(args) >= 4 else (kwargs["dim"], kwargs["start"], kwargs["length"])
    before = recorder.axes(args[0])[dim]
    _bound(recorder, start, before)
    tie(recorder, length, recorder.axes(result)[dim])


@handles("__getitem__")
def getitem(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Bounds of slices: a literal bound locks what lies before it."""
    tensor, key = args
    items = key if isinstance(key, tuple) else (key,)
    if not any(isinstance(item, slice) for item in items):
        return
    axes, d = recorder.axes(tensor), 0
    given = sum(1 for item in items if item is not None and item is not Ellipsis)
    for item in items:
        if item is Ellipsis:
            d += len(axes) - given
        elif isinstance(item, slice) and item.step not in (None, 1):
            d += 1  # the rule of the operator has judged a strided slice
        elif isinstance(item, slice):
            _slice_bounds(recorder, item, axes[d])
            d += 1
        elif isinstance(item, Tensor) and item.dtype.is_floating_point is False and item.dim() > 1 and _is_mask(item):
            d += item.dim()
        elif item is not None:
            d += 1


def _is_mask(item: Tensor) -> bool:
    return str(item.dtype) in ("torch.bool", "torch.uint8")


def _slice_bounds(recorder: Recorder, item: slice, axis: Axis) -> None:
    for bound in (item.start, item.stop):
        if isinstance(bound, int):
            _bound(recorder, bound, axis)


def _bound(recorder: Recorder, bound: int, axis: Axis) -> None:
    """A slice bound counts the positions before it (or after it, when negative)."""
    size, position = axis.size, int(bound)
    if position in (0, size) or abs(position) > size:
        return
    if position < 0 and not isinstance(bound, TrackedInt):
        _tie_side(recorder, -position, axis, size + position, before=False)
        return
    _tie_side(recorder, bound, axis, position % size, before=True)


def _tie_side(recorder: Recorder, value: int, axis: Axis, at: int, *, before: bool) -> None:
    try:
        low, high = recorder.space.split_sum(axis, at)
    except Conflict:
        lock(axis, recorder.reason("a slice does not follow the structure of this dimension"))
        return
    tie(recorder, value, low if before else high)


@handles("layer_norm", "rms_norm")
def normalized_shape(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Sizes of the normalised dimensions."""
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    axes = recorder.axes(result)
    for value, axis in zip(shape, axes[len(axes) - len(shape) :], strict=True):
        tie(recorder, value, axis)


@handles("instance_norm", "batch_norm")
def num_features(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """A norm without parameters keeps its width in an attribute only."""
    owner = recorder.modules.get(recorder.module)
    if isinstance(owner, nn.modules.batchnorm._NormBase):
        tie(recorder, owner.num_features, recorder.axes(args[0])[1])


@handles("group_norm")
def num_groups(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """The number of normalisation groups."""
    value = args[1] if len(args) > 1 else kwargs["num_groups"]
    if value > 1:
        tie(recorder, value, _factor(recorder, recorder.axes(result)[1], int(value), outer=True))


@handles("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_groups(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """The number of convolution groups."""
    value = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    if value > 1:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        tie(recorder, value, _factor(recorder, recorder.axes(weight)[0], int(value), outer=True))


@handles("multi_head_attention_forward")
def multi_head_attention(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """nn.MultiheadAttention takes embed_dim = heads x head size for granted, so its input width is that product.

    Whole heads then go with their share of the width, or the same coordinates of every head with theirs.
    """
    query = args[0] if args else kwargs["query"]
    width, embed_dim, heads = recorder.axes(query)[-1], *args[3:5]
    packed = args[5] if len(args) > 5 else kwargs.get("in_proj_weight")
    separate = [kwargs.get(f"{name}_proj_weight") for name in "qkv"]
    inner = [recorder.axes(weight)[0] for weight in separate if isinstance(weight, Tensor)]
    try:
        if isinstance(packed, Tensor) and not inner:
            inner = [recorder.space.split_product(recorder.axes(packed)[0], 3)[1]]
        for axis in inner:
            recorder.space.unify(width, axis)
        tie(recorder, heads, recorder.space.split_product(width, int(heads))[0])
    except Conflict:
        reason = recorder.reason("the width of nn.MultiheadAttention does not follow its heads")
        for axis in (width, *inner):
            lock(axis, reason)
    tie(recorder, embed_dim, width)
