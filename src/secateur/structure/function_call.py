"""One call of a Python function of torch, and what its handler can say about the integers in it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsIndex, cast

from torch import Tensor

from secateur.structure.axes import Axis, Conflict, is_data, lock
from secateur.structure.provenance import TrackedInt, dims_in, expr_of, is_literal
from secateur.structure.recorder import Recorder
from secateur.structure.trace import Args, Axes, Kwargs, SizeUse
from secateur.types import Lock


@dataclass(frozen=True, eq=False)
class FunctionCall:
    """One call of a function or method of torch, after it ran.

    Args:
        recorder: of the run.
        name: of the function.
        args, kwargs: as the user's code passed them, integers with their provenance.
        result: what it returned.
    """

    recorder: Recorder
    name: str
    args: Args
    kwargs: Kwargs
    result: object

    def get(self, position: int, *names: str, default: object = None) -> object:
        """An argument by its position or one of its names."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def integer(self, position: int, name: str, default: int = 0) -> int:
        """An argument that is an integer."""
        return cast(int, self.get(position, name, default=default))

    def tensor(self, position: int, name: str) -> Tensor:
        """An argument that is a tensor."""
        return cast(Tensor, self.get(position, name))

    def axes(self, tensor: object) -> Axes:
        """Dimensions of a tensor."""
        return self.recorder.axes(cast(Tensor, tensor))

    def pieces(self, dim: int) -> list[Axis]:
        """One dimension of every tensor that was returned."""
        return [self.axes(piece)[dim] for piece in cast(Iterable[Tensor], self.result)]

    def tie(self, value: object, axis: Axis | None) -> None:
        """State that `value` is the size of `axis`."""
        value = plain(value)
        if axis is None or axis.size == 1 or value is None or value < 0:
            return
        place = self.recorder.here.use()
        expr = expr_of(value)
        if is_literal(expr):
            hint = "replace the number by a size read from the tensor or by an attribute"
            lock(
                axis,
                Lock(f"the size {int(value)} is written in the code", place.op, place.module, place.where, hint),
            )
        elif int(value) == axis.size:  # else the integer counts something else: -1, or a size that is broadcast
            self.recorder.trace.size_uses.append(SizeUse(expr, axis, place))

    def reached(self, value: object, axis: Axis) -> None:
        """State that `axis` was cut at `value`: where the input decides how far it is reached, it holds positions."""
        opened = any(each is axis for each in self.recorder.opened)
        if opened and isinstance(value, TrackedInt) and any(is_data(each) for each in dims_in(value.expr)):
            lock(axis, self.recorder.reason("reached as far as the input is long: what lies along it are positions"))

    def bounded(self, value: object, axis: Axis, *, inside: bool = False) -> None:
        """State that `value` bounds a part of `axis`.

        Where the data say how much, the example may reach all of it and another input less. A bound inside opens a
        seam, of which `reached` hears; `inside` says that none does.
        """
        tracked = isinstance(value, TrackedInt) and any(is_data(each) for each in dims_in(value.expr))
        counted = type(value) is int and value in self.recorder.lengths
        if counted or (tracked and (inside or int.__int__(cast(int, value)) >= axis.size)):
            lock(axis, self.recorder.reason("how much of this dimension is used is a size of the data"))

    def watch(self, value: object) -> None:
        """State that `value` went into a computation, so that the cut model must compute it alike."""
        if isinstance(value, TrackedInt) and not is_literal(value.expr):
            self.recorder.trace.size_uses.append(SizeUse(value.expr, int(value), self.recorder.here.use()))

    def factor(self, axis: Axis, count: int, *, outer: bool) -> Axis:
        """The factor of `axis` that has `count` indices; the whole of it where its structure has no such factor."""
        try:
            if outer:
                return self.recorder.space.split_product(axis, count)[0]
            return self.recorder.space.split_product(axis, axis.size // count)[1]
        except Conflict:
            return axis


def plain(value: object) -> int | None:
    """An integer with its provenance; NumPy's integers and tensors that serve as one have none, like a literal."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, Tensor):
        whole = value.numel() == 1 and not value.is_floating_point() and not value.is_meta
        return int(value) if whole else None
    try:
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        return None
