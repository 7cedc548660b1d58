"""Runs of a model without some blocks or branches, and with eyes on what these add; nothing is taken out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from secateur.model.bypass import bypassed, first_tensor, hidden_of
from secateur.model.call import call
from secateur.structure.branches import ResidualBranch
from secateur.structure.capture import quiet
from secateur.structure.sums import BlockSums, SumPlace
from secateur.types import Example, Group

Unit = ResidualBranch | str  # what may be left out of a run: a branch, or a block by its name


def units_of(group: Group) -> Sequence[Unit]:
    """What the units of a group of layers or sub-blocks are."""
    units: Sequence[Unit] = group.attributes.get("branches") or group.attributes["blocks"]
    return units[: group.size]


class _Skipping(BlockSums):
    """The sums that end some branches hand on their trunk alone."""

    def __init__(self, model: nn.Module, branches: Sequence[ResidualBranch]) -> None:
        super().__init__(model, list(dict.fromkeys(branch.block for branch in branches)))
        self.sides = {branch.place: branch.side for branch in branches}

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> tuple[Tensor, bool] | None:
        side = self.sides.get(self.place())
        if side is None:
            return None
        trunk = operands[1 - side]
        # A sum that writes into its first operand: into the trunk itself, or over what was added.
        return (trunk.clone() if writes else trunk), writes

    def met(self, known: tuple[Tensor, bool] | None, total: Tensor) -> Tensor:
        if known is None:
            return total
        trunk, writes = known
        return total.copy_(trunk) if writes else trunk.to(total.dtype, copy=True)


@contextmanager
def left_out(model: nn.Module, units: Sequence[Unit]) -> Iterator[None]:
    """Run a model without some blocks or branches: everything is computed as ever, and not added.

    Args:
        model: patched inside the context, then as before.
        units: branches, or names of blocks.
    """
    branches = [unit for unit in units if isinstance(unit, ResidualBranch)]
    with bypassed(model, [unit for unit in units if isinstance(unit, str)]), _Skipping(model, branches).hooks():
        yield


class _Adding(BlockSums):
    """Measures what some branches add."""

    def __init__(self, model: nn.Module, branches: Sequence[ResidualBranch]) -> None:
        super().__init__(model, list(dict.fromkeys(branch.block for branch in branches)))
        self.sides = {branch.place: branch.side for branch in branches}
        self.most: dict[SumPlace, float] = {}

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> None:
        place = self.place()
        if place in self.sides:
            self.most[place] = float(operands[self.sides[place]].detach().abs().max())


def added(model: nn.Module, example: Example, branches: Sequence[ResidualBranch]) -> dict[SumPlace, float]:
    """The largest number that each branch adds to its hidden state; sums that are not met are left out.

    Cost: one forward pass.
    """
    adding = _Adding(model, branches)
    with quiet(model, example), torch.no_grad(), adding.hooks():
        call(model, example)
    return adding.most


Seen = Callable[[int, Tensor], None]


class _Reading(BlockSums):
    """Shows the hidden state before and after some branches."""

    def __init__(self, model: nn.Module, branches: Mapping[int, ResidualBranch], enter: Seen, leave: Seen) -> None:
        super().__init__(model, list(dict.fromkeys(branch.block for branch in branches.values())))
        self.wanted = {branch.place: (number, branch.side) for number, branch in branches.items()}
        self.enter, self.leave = enter, leave

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> int | None:
        number, side = self.wanted.get(self.place(), (None, 0))
        if number is not None:
            self.enter(number, operands[1 - side])
        return number

    def met(self, known: int | None, total: Tensor) -> Tensor:
        if known is not None:
            self.leave(known, total)
        return total


@contextmanager
def reading(model: nn.Module, units: Mapping[int, Unit], enter: Seen, leave: Seen) -> Iterator[None]:
    """Show the hidden state on both sides of some blocks or branches, in the order of the run.

    Args:
        model: watched inside the context.
        units: number -> branch, or name of a block.
        enter: called as ``enter(number, hidden)`` with what a unit adds to; copy what is to be kept.
        leave: called as ``leave(number, hidden)`` with the hidden state behind it, if a tensor is handed on.
    """
    branches = {number: unit for number, unit in units.items() if isinstance(unit, ResidualBranch)}
    with ExitStack() as stack:
        for number, unit in units.items():
            if isinstance(unit, str):
                block = model.get_submodule(unit)
                stack.callback(block.register_forward_pre_hook(_entering(number, enter), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(_leaving(number, leave)).remove)
        if branches:
            stack.enter_context(_Reading(model, branches, enter, leave).hooks())
        yield


def _entering(number: int, enter: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        hidden = hidden_of(args, kwargs)
        assert hidden is not None
        enter(number, hidden)

    return hook


def _leaving(number: int, leave: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        hidden = first_tensor(output)
        if hidden is not None:
            leave(number, hidden)

    return hook
