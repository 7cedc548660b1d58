"""Missing slices of tensors: finding them, leaving them out, putting them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from secateur.model.tensors import can_be_nan

Op = OpOverload[..., object]
Arguments = dict[str, object]
NAN = float("nan")
NOTHING = object()
ELSEWHERE = (1.0, 0.5, 0.3, 0.8, 0.15)  # parts of the way along a dimension


class Gaps(Protocol):
    """Who knows what is missing.

    Attributes:
        reduced: sizes of dimensions that were summed up, and how many of their positions were there; with the functions
            that did so.
    """

    reduced: dict[tuple[int, int], set[CodeType]]

    def of(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Ascending numbers of the missing positions of a dimension; None where nothing is missing."""

    def left(self, weight: Tensor, dim: int) -> Tensor | None:
        """Positions of a weight's dimension that are there; None where all are, or none is."""

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a weight of which something is missing."""

    def picked(self, weight: Tensor, picks: Mapping[int, Tensor]) -> Tensor:
        """A weight at some positions of some dimensions, and no more of it than that."""

    def note(self, tensor: Tensor, absent: dict[int, Tensor]) -> None:
        """Remember what is missing where NaN cannot say it: in truth values and counts."""

    def noted(self, tensor: Tensor) -> dict[int, Tensor]:
        """What was remembered."""

    def counts(self, call: GapCall, whole: Tensor, dims: Sequence[int], kept: Mapping[int, Tensor]) -> bool:
        """Whether a sum, given with what is missing left out, tells how many units there are and nothing else."""

    def multiplies(self, one: Tensor, other: Tensor, along: int, summed: int, size: int) -> None:
        """Hear of a sum of products of two factors over what is left of a dimension that had this size."""

    def anywhere(self, tensor: Tensor) -> dict[int, Tensor]:
        """Dimension -> its missing positions, of the dimensions that miss some but not all."""


class GapCall:
    """An operator and what it is called with.

    Args:
        func: the operator.
        args: its arguments by place.
        kwargs: its arguments by name.
        whole: makes what an operator must be given of each argument, where parts of it were not made.
    """

    def __init__(
        self, func: Op, args: Sequence[Any], kwargs: Arguments, whole: Callable[[Any], Any] | None = None
    ) -> None:
        self.func, self.args, self.kwargs, self.whole = func, list(args), kwargs, whole

    def get(self, name: str, default: object = None) -> Any:
        """An argument by its name in the operator's schema."""
        if name in self.kwargs:
            return self.kwargs[name]
        place, usual = parameters(self.func).get(name, (None, None))
        if place is None:
            return default
        if place < len(self.args):
            return self.args[place]
        return default if usual is NOTHING else usual

    def put(self, name: str, value: object) -> None:
        """Another value for an argument."""
        place, _ = parameters(self.func).get(name, (None, None))
        if place is not None and place < len(self.args):
            self.args[place] = value
        else:
            self.kwargs[name] = value

    def run(self) -> Any:
        """Call the operator."""
        if self.whole is not None:
            self.args = [self.whole(value) for value in self.args]
            self.kwargs = {name: self.whole(value) for name, value in self.kwargs.items()}
        return self.func(*self.args, **self.kwargs)


@cache
def parameters(func: Op) -> dict[str, tuple[int | None, object]]:
    """Name of a parameter -> its place, and its default or `NOTHING`; a schema makes all of that anew when asked."""
    return {
        argument.name: (place, argument.default_value if argument.has_default_value() else NOTHING)
        for place, argument in enumerate(func._schema.arguments)
    }


@cache
def _written(func: Op) -> list[tuple[int, str]]:
    """Places and names of parameters that a call writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def tensors(args: Iterable[object], kwargs: Mapping[str, object] | None = None) -> list[Tensor]:
    """The tensors in arguments or results, which hold lists of tensors at most: asked at every call, so no tree."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


@cache
def is_composite(func: Op) -> bool:
    """Whether an operator is made of others in the library itself, not by a second writing of it that may round."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key not in func.py_kernels and torch._C._dispatch_has_kernel_for_dispatch_key(str(func.name()), key)  # type: ignore[no-untyped-call]


@cache
def name_of(func: Op) -> tuple[str, bool]:
    """The operator's name without its overload, and whether it writes to its operands."""
    return func._schema.name.removeprefix("aten::"), bool(func._schema.is_mutable)


def writes(func: Op, args: Sequence[object], kwargs: Arguments) -> list[Tensor]:
    """Operands that a call writes to."""
    return [t for i, name in _written(func) for t in tensors((args[i] if i < len(args) else kwargs.get(name),))]


def has_nan(tensor: Tensor) -> bool:
    """One pass that makes nothing; infinities of both signs give a needless yes."""
    return bool(torch.isnan(tensor.detach().sum()))


def look(tensor: Tensor, dim: int) -> Tensor | None:
    """Positions of a dimension that are NaN throughout."""
    dim %= tensor.dim()
    maybe = torch.isnan(line(tensor, dim, 0)).nonzero().flatten()  # a slice that is NaN throughout begins with NaN
    if len(maybe) == tensor.shape[dim]:  # the line lies where another dimension misses something
        for part in ELSEWHERE:
            maybe = maybe[torch.isnan(line(tensor, dim, part)[maybe])]
            if len(maybe) == 0:
                break
    if len(maybe) == 0:
        return None
    inside = torch.isnan(tensor.index_select(dim, maybe)).movedim(dim, 0).reshape(len(maybe), -1)
    gone = maybe[inside.all(1)]
    return gone if len(gone) else None


def line(tensor: Tensor, dim: int, part: float) -> Tensor:
    """All positions of one dimension, at a part of the way along all others."""
    return tensor[tuple(slice(None) if d == dim else int(part * (size - 1)) for d, size in enumerate(tensor.shape))]


def others(size: int, gone: Tensor) -> Tensor:
    """Positions that are not among these."""
    stays = torch.ones(size, dtype=torch.bool, device=gone.device)
    stays[gone] = False
    return stays.nonzero().flatten()


def pick(tensor: Tensor, dim: int, stay: Tensor) -> Tensor:
    """`index_select`, along the rows in memory where the tensor is a transposed matrix (three times as fast)."""
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        return tensor.t().index_select(1 - dim % 2, stay).t()
    return tensor.index_select(dim, stay)


def spread(tensor: Tensor, dim: int, size: int, stay: Tensor) -> Tensor:
    """At full size again; what is missing is NaN."""
    shape = list(tensor.shape)
    shape[dim] = size
    blank = NAN if can_be_nan(tensor) else 0
    return tensor.new_full(shape, blank).index_copy_(dim, stay, tensor)
