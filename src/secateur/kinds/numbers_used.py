"""The plain numbers that a run uses, line by line: a cut model is to use those of its reference.

Code that counts what a cut removes (experts, blocks) reckons with another count afterwards: a capacity, a share, a
power of the depth. Where the outputs do not show it (no expert overflows, a bound is far away), the numbers do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

from torch import Tag, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import CertificateError
from secateur.model.place import users_line
from secateur.structure import rules
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Args, Kwargs, Op, tensors_of

HINT = (
    "Keep that number in an attribute that is a float, which no cut changes, or protect what is counted there. Nothing "
    "was changed or saved."
)
MADE = "lift_fresh"  # torch.tensor(number) inside a forward
FEW = 64  # numbers of a constant that are looked at
FILLS = ("full", "fill", "scalar_tensor", "full_like", "masked_fill", "index_fill", "constant_pad_nd")
BOUNDS = ("select", "slice", "narrow")  # which position is meant depends on the size of the dimension
# Integers in a list of these are sizes of the result, which the calls that use it show.
SIZED = frozenset([
    "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "zeros", "ones", "empty", "rand", "randn", "full",
    "new_zeros", "new_ones", "new_empty", "new_full", "as_strided", "empty_strided", "split_with_sizes", "randint",
    "unflatten", "broadcast_to", "native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm", "resize", "repeat",
])  # fmt: skip
Site = tuple[str, str]  # line of the user's code, operator
Results = Callable[[str, Tensor, Sequence[Tensor]], Tensor | None]  # operator, its result, its operands -> what is kept


@dataclass(frozen=True)
class Used:
    """The plain numbers of one call.

    Args:
        numbers: in the order of the arguments.
        size: of the dimension in which they are positions; 0 where they are none.
        whole: whether all tensors of the call hold integers.
        pointwise: whether it acts element by element, so that all its numbers are values.
        shapes: of its tensors.
        result: what it gave, or every so many positions of it, where somebody asked for results.
        size_in: the largest finite number that it was given, beside which a smaller one is rounding.
    """

    numbers: tuple[float, ...]
    size: int = 0
    whole: bool = False
    pointwise: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()
    result: Tensor | None = None
    size_in: float = 0.0


class NumbersUsed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every plain number that a call is given, and the line that gave it.

    Args:
        apart: names of modules whose own calls do not count.
        results: gives what is to be kept of the result of an operator, if anything; None where nobody asks for results.
    """

    def __init__(self, apart: Sequence[str] = (), results: Results | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.apart, self.results = apart, results
        self.calls: dict[Site, list[Used]] = defaultdict(list)
        self.read: set[float] = set()  # what tensors gave the code: data, as the outputs are
        self.paused = 0

    def __torch_dispatch__(self, func: Op, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        # As for the engine's own modes: calls that are made of others come here one by one, whatever the kernel.
        result = rules.by_parts(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        used = None if self.paused else self._note(func, args, kwargs)
        # What an operand holds is looked at before it may be written to.
        size_in = largest(args, kwargs) if self.results is not None and used is not None else 0.0
        result = func(*args, **kwargs)
        if type(result) in (int, float):
            self.read.add(result)
        if self.results is not None and used is not None and isinstance(result, Tensor):
            kept = self.results(base_name(func), result, tensors_of((args, kwargs)))
            used[-1] = replace(used[-1], result=kept, size_in=size_in)
        return result

    def _note(self, func: Op, args: Args, kwargs: Kwargs) -> list[Used]:
        name, tensors = base_name(func), tensors_of((args, kwargs))
        numbers = tuple(_numbers((*args, *kwargs.values()), sizes=name in SIZED))
        if MADE in func._schema.name:
            numbers = tuple(n for t in tensors if t.numel() <= FEW and not t.is_complex() for n in _values(t))
        dim = args[1] if name in BOUNDS and len(args) > 1 and isinstance(args[1], int) else None
        size = tensors[0].shape[dim] if tensors and dim is not None and tensors[0].dim() else 0
        whole = not any(t.is_floating_point() or t.is_complex() for t in tensors)
        shapes = tuple(tuple(t.shape) for t in tensors)
        pointwise = Tag.pointwise in func.tags or name in FILLS
        calls = self.calls[users_line(), name]
        calls.append(Used(numbers, size, whole, pointwise, shapes))
        return calls

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch a run of this model."""

        def enter(*_: object) -> None:
            self.paused += 1

        def leave(*_: object) -> None:
            self.paused -= 1

        modules = [model.get_submodule(name) for name in self.apart]
        handles = [module.register_forward_pre_hook(enter) for module in modules]
        handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def largest(args: Args, kwargs: Kwargs) -> float:
    """The largest finite number of the floating-point operands, without its sign."""
    found = [t.detach() for t in tensors_of((args, kwargs)) if t.is_floating_point() and t.numel()]
    return max((float(t.nan_to_num(0, 0, 0).abs().max()) for t in found), default=0.0)


def _numbers(values: Iterable[object], *, sizes: bool) -> Iterator[float]:
    """Scalars, and what lists hold: there integers may be the sizes of a result."""
    kinds = (float,) if sizes else (int, float)
    for value in values:
        if type(value) in (int, float):
            yield cast(float, value)
        elif type(value) in (list, tuple):
            yield from (item for item in value if type(item) in kinds)  # type: ignore[attr-defined]


def _values(tensor: Tensor) -> list[float]:
    found: list[float] = tensor.detach().flatten().tolist()
    return found


def require_same(site: Site, before: NumbersUsed, after: NumbersUsed, one: Used, other: Used) -> None:
    """Refuse a call that is given another number than in the reference.

    Raises:
        CertificateError: names the line and both numbers.
    """
    if len(one.numbers) != len(other.numbers):
        raise _refused(site, f"{len(one.numbers)} numbers become {len(other.numbers)}")
    for a, b in zip(one.numbers, other.numbers, strict=True):
        if not is_same(before, after, a, b):
            raise _refused(site, f"{a:g} becomes {b:g}")


def is_same(before: NumbersUsed, after: NumbersUsed, a: float, b: float) -> bool:
    """Whether two numbers are one up to rounding, or both read from tensors: those are compared as all data are."""
    if a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-6):
        return True
    return a in before.read and b in after.read


def _refused(site: Site, how: str) -> CertificateError:
    return CertificateError(
        "The function of what is left would change with the cut, also where the example does not show it.",
        why=f"{site[0]} reckons with a number that is another one after the cut ({how}, in {site[1]})",
        hint=HINT,
    )


def by_turns(calls: Sequence[Used], left: Sequence[Used], stays: Sequence[Sequence[bool]]) -> list[Used] | None:
    """Of calls in a loop over blocks those of the blocks that stay; None where they do not come once for each block.

    Args:
        calls: of a line, with all blocks.
        left: with those that stay.
        stays: for each stack, which of its blocks stay.
    """
    for stack in stays:
        each, rest = divmod(len(calls), len(stack))
        if each and not rest and len(left) == each * sum(stack):
            return [call for n, call in enumerate(calls) if stack[n // each]]
    return None
