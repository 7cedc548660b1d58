"""Results of a replay that are NaN where something is removed, as long as only what is kept of them is asked for.

A product whose weight lacks rows gives NaN there. Operators that act element by element hand that on, and the next
product leaves it out again: in between nobody needs the tensor at its full size. What is narrow here is so by what the
product has given, not by what a rule says: as soon as anything else reads the tensor it is spread, and holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from secateur.kinds.slices.factors import pick, spread
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Kwargs, Ref, Step

# They give NaN for NaN, each element by itself.
ALONE = frozenset(["relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "tanh", "add", "sub", "mul"])
NORMS = {"native_batch_norm": 5, "_native_batch_norm_legit_no_training": None}  # place of `training`, if there is one


class Narrow:
    """A tensor that is NaN at all positions of a dimension but some.

    Args:
        small: what it holds at these positions.
        dim: the dimension.
        size: how many positions it has.
        stay: the positions.
    """

    def __init__(self, small: Tensor, dim: int, size: int, stay: Tensor) -> None:
        self.small, self.dim, self.size, self.stay = small, dim % small.dim(), size, stay
        self._full: Tensor | None = None

    @property
    def is_small(self) -> bool:
        """Whether nobody has asked for the whole tensor, to which others may have written since."""
        return self._full is None

    def full(self) -> Tensor:
        """The whole tensor, from now on the only one."""
        if self._full is None:
            self._full = spread(self.small, self.dim, self.size, self.stay)
        return self._full

    def at(self, dim: int, stay: Tensor) -> Tensor:
        """The tensor at some positions of a dimension."""
        if self.is_small and dim % self.small.dim() == self.dim and _same(stay, self.stay):
            return self.small
        return pick(self.full(), dim, stay)

    def like(self, small: Tensor) -> Narrow:
        """Another result at the same positions."""
        return Narrow(small, self.dim, self.size, self.stay)

    def fits(self, other: object) -> bool:
        """Whether another is narrow in the same way."""
        return (
            isinstance(other, Narrow)
            and other.is_small
            and (other.dim, other.size, other.small.shape) == (self.dim, self.size, self.small.shape)
            and _same(other.stay, self.stay)
        )


def spread_out(value: Tensor | Narrow) -> Tensor:
    """The whole tensor in either form."""
    return value.full() if isinstance(value, Narrow) else value


def run_narrow(
    step: Step,
    args: list[object],
    kwargs: Kwargs,
    values: Mapping[int, Tensor | Narrow],
    whole: Callable[[int], Tensor],
) -> list[Tensor | Narrow] | None:
    """A call on what is kept of its first operand; None where that would not be the same.

    Args:
        step: the call.
        args: its arguments.
        kwargs: those by name.
        values: tensor number -> what it holds.
        whole: gives a tensor by its number.
    """
    first = values.get(args[0].number) if args and isinstance(args[0], Ref) else None
    if not isinstance(first, Narrow) or not first.is_small or step.contracted or step.restrict is not None:
        return None
    name = base_name(step.func)
    if name in ALONE:
        return _alone(step, first, args, kwargs, values)
    if name in NORMS and first.dim == 1:
        place = NORMS[name]
        if place is None or args[place] is False:
            return _normed(step, first, args, kwargs, whole)
    return None


def _alone(
    step: Step, first: Narrow, args: list[object], kwargs: Kwargs, values: Mapping[int, Tensor | Narrow]
) -> list[Tensor | Narrow] | None:
    operands = [values.get(arg.number) if isinstance(arg, Ref) else arg for arg in args]
    if any(isinstance(arg, (list, tuple)) for arg in args) or any(isinstance(arg, Ref) for arg in kwargs.values()):
        return None
    if not all(first.fits(each) for arg, each in zip(args, operands, strict=True) if isinstance(arg, Ref)):
        return None
    small = step.func(*(each.small if isinstance(each, Narrow) else each for each in operands), **kwargs)
    # Written in place, it is the same result under another number.
    return [first if small is first.small else first.like(cast(Tensor, small))]


def _normed(
    step: Step, first: Narrow, args: list[object], kwargs: Kwargs, whole: Callable[[int], Tensor]
) -> list[Tensor | Narrow]:
    """A batch norm with kept statistics, which acts on every channel by itself."""
    per_channel = [
        whole(arg.number).index_select(0, first.stay.to(first.small.device)) if isinstance(arg, Ref) else arg
        for arg in args[1:5]
    ]
    out, *rest = cast("tuple[Tensor, ...]", step.func(first.small, *per_channel, *args[5:], **kwargs))
    return [first.like(out), *rest]


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)
