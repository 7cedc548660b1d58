"""The plain numbers that a run passes to its operations.

A model may scale by the size of a dimension (`x / x.shape[-1]`, `scores / math.sqrt(head_dim)`). After a cut its code
computes that number anew, so the replay of the original must use the number of the cut model, not the old one. Integers
count only where they are values: as sizes and positions they belong to the full-size replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.structure import rules
from secateur.structure.rules.base import MOVED, base_name
from secateur.structure.trace import Args, Kwargs, Op, Ref, Step

MADE = "lift_fresh"  # torch.tensor(number) inside a forward
ATEN = torch.ops.aten
PRODUCTS: dict[Op, tuple[Op, ...]] = {
    ATEN.mm.default: (ATEN.mm.default,),
    ATEN.bmm.default: (ATEN.mm.default,),
    ATEN.addmm.default: (ATEN.mm.default, ATEN.add.Tensor),
    ATEN.baddbmm.default: (ATEN.mm.default, ATEN.add.Tensor),
}
READ = "a number for Python"  # what item() gave, among the arguments by name


@dataclass(frozen=True, eq=False, slots=True)
class PlayedCall:
    """One call of the cut model's run: its plain arguments, with None in place of tensors."""

    func: Op
    args: Args
    kwargs: Kwargs


class NumberTape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every call with its plain arguments, in the order in which the engine records steps."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[PlayedCall] = []

    def __torch_dispatch__(self, func: Op, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        # As the engine's own mode does, so that both runs consist of the same calls.
        result = rules.by_parts(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        if MADE in func._schema.name:
            # A number that became a tensor is still a number of the code. Larger constants hold data.
            made = tuple(t.clone() if isinstance(t, Tensor) and t.dim() == 0 else None for t in args)
            self.calls.append(PlayedCall(func, made, {}))
        else:
            plain = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
            self.calls.append(PlayedCall(func, tuple(None if isinstance(a, Tensor) else a for a in args), plain))
        result = func(*args, **kwargs)
        if type(result) in (int, float):
            self.calls[-1].kwargs[READ] = result
        return result


def align(steps: Sequence[Step], calls: Sequence[PlayedCall]) -> list[PlayedCall | None]:
    """The call of the other run for every step, or nothing if the runs differ.

    Calls that only move data are left out: whether a product copies its operands depends on their sizes. So does
    whether it adds a bias by itself; where the two runs differ in that, none has numbers.
    """
    mine = [(part, i) for i, step in enumerate(steps) for part in _parts(step.func)]
    theirs = [(part, played) for played in calls for part in _parts(played.func)]
    found: list[PlayedCall | None] = [None] * len(steps)
    if [part for part, _ in mine] != [part for part, _ in theirs]:
        # One call that differs and the numbers of all others belong to nobody knows which step.
        return []
    for (_, i), (_, played) in zip(mine, theirs, strict=True):
        if steps[i].func is played.func:
            if len(steps[i].args) != len(played.args):
                return []
            found[i] = played
        elif steps[i].kwargs or played.kwargs:
            return []
    return found


def _parts(func: Op) -> tuple[Op, ...]:
    """What a call does, beside moving data; a product does the same over batches as without."""
    return () if base_name(func) in MOVED else PRODUCTS.get(func, (func,))


def numbers(step: Step, played: PlayedCall) -> tuple[list[object], Kwargs]:
    """Arguments of a step with the values that the other run used."""
    values = torch.Tag.pointwise in played.func.tags
    args = [_choose(mine, their, values) for mine, their in zip(step.args, played.args, strict=True)]
    kwargs = {key: _choose(mine, played.kwargs.get(key, mine), values) for key, mine in step.kwargs.items()}
    return args, kwargs


def _choose(mine: object, their: object, values: bool) -> object:
    if isinstance(mine, Ref):
        return their if isinstance(their, Tensor) else mine
    # Fractions are always values. Integers are so in pointwise calls only: elsewhere they are sizes and positions,
    # and those of the smaller model do not fit the replay at full size.
    if type(mine) is float and type(their) is float:
        return their
    return their if values and type(mine) is int and type(their) is int else mine
