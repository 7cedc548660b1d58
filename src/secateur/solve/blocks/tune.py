"""Sub-block reconstruction: the weights that a sub-block keeps are trained towards the outputs of the original.

Each layer by itself is solved already. A sub-block (attention, MLP) has what layers do not see, its non-linear
functions; so Adam goes on from the solution, with all its layers at once. Held-out batches say which pass was best, and
whether any was better than none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.model.padding import without_padding
from secateur.solve.blocks.capture import BlockCall
from secateur.solve.blocks.settings import Reconstruction
from secateur.solve.blocks.taps import END, SubBlock, find_parts, read_parts

FLOOR = 0.01  # share of the mean square that is added to that of each coordinate or token, so that none is divided by 0


@dataclass(frozen=True)
class SubBlockRecord:
    """What became of a sub-block.

    Args:
        block: its name.
        branch: the sub-block is a residual branch; else the whole block, or what follows its last branch.
        before, after: error on held-out batches, relative to the original's outputs; on all batches where none is held.
        epochs: passes after which it was best; 0 = the training was refused.
    """

    block: str
    branch: bool
    before: float
    after: float
    epochs: int


@dataclass(frozen=True, eq=False)
class BlockGoal:
    """The sub-blocks of a block, and what the original makes of each batch.

    Args:
        parts: the sub-blocks.
        outputs: batch by batch, part by part.
    """

    parts: Sequence[SubBlock]
    outputs: Sequence[Sequence[Tensor]]


def goal_of(
    block: nn.Module,
    calls: Sequence[BlockCall],
    hidden: Callable[[int], Tensor],
    parameters: Mapping[str, nn.Parameter],
    how: Reconstruction,
) -> BlockGoal:
    """Run a block of the original on all batches.

    Args:
        block: with the original's weights.
        calls: how it is called, batch by batch.
        hidden: what goes into it, a new copy every time.
        parameters: that are pruned, by name.
        how: which side of a sum is the target.
    """
    parts = find_parts(lambda h: calls[0].run(block, h), hidden(0), parameters)
    side = 0 if how.target == "branch" else 1
    outputs = []
    for number, one in enumerate(calls):
        with torch.no_grad():
            found = read_parts(lambda h, one=one: one.run(block, h), hidden(number), parts)  # type: ignore[misc]
        outputs.append([both[side].clone() for both in found])
    return BlockGoal(parts, outputs)


def tune_block(
    name: str,
    block: nn.Module,
    calls: Sequence[BlockCall],
    hidden: Callable[[int], Tensor],
    goal: BlockGoal,
    masks: Mapping[str, Tensor],
    tokens: Sequence[Tensor | None],
    held: Sequence[int],
    how: Reconstruction,
) -> list[SubBlockRecord]:
    """Train the sub-blocks of a pruned block, one after the other; its weights are written in place.

    Args:
        name: of the block.
        block: with pruned weights.
        calls: how it is called, batch by batch.
        hidden: what the pruned blocks before it hand on, a new copy every time.
        goal: what the original makes of the batches.
        masks: parameter name -> True = keep; what is False stays +0.0.
        tokens: batch by batch, True = no padding; None = there is none.
        held: batches that choose and are not learned from; with none all batches choose.
        how: the training.
    """
    records = []
    for place, part in enumerate(goal.parts):
        inside = {key.removeprefix(f"{name}."): masks[key] for key in part.names if key in masks}
        if inside:
            work = _Training(block, calls, hidden, goal, place, inside, tokens, held, how)
            before, after, epochs = work.run()
            records.append(SubBlockRecord(name, part.sum != END, before, after, epochs))
    return records


class _Training:
    """The training of one sub-block."""

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[BlockCall],
        hidden: Callable[[int], Tensor],
        goal: BlockGoal,
        place: int,
        masks: Mapping[str, Tensor],
        tokens: Sequence[Tensor | None],
        held: Sequence[int],
        how: Reconstruction,
    ) -> None:
        self.block, self.calls, self.hidden, self.how = block, calls, hidden, how
        self.part, self.goals = goal.parts[place], [one[place] for one in goal.outputs]
        self.side = 0 if how.target == "branch" else 1
        self.masks, self.tokens = masks, tokens
        self.learn = [i for i in range(len(calls)) if i not in set(held)]
        self.judge = list(held) or self.learn
        self.parameters = {key: block.get_parameter(key) for key in masks}
        # Steps of Adam are smaller than the last digit of a half-precision weight.
        self.masters = {
            key: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True).requires_grad_()
            for key, p in self.parameters.items()
        }
        self.scale = self._scale()

    def run(self) -> tuple[float, float, int]:
        """Train, and write the best weights; (error before, after, passes of the best)."""
        before = best = self._judged()
        epochs, kept = 0, self._copies()
        adam = torch.optim.Adam(list(self.masters.values()), lr=self.how.lr)
        order = torch.Generator().manual_seed(self.how.seed)
        step, steps = 0, self.how.epochs * len(self.learn)
        for epoch in range(1, self.how.epochs + 1):
            for place in torch.randperm(len(self.learn), generator=order).tolist():
                adam.param_groups[0]["lr"] = self.how.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                self._learn(self.learn[place], adam)
                step += 1
            error = self._judged()
            # A comparison that NaN does not pass.
            if error < best:
                best, epochs, kept = error, epoch, self._copies()
        with torch.no_grad():
            for key, value in kept.items():
                self.parameters[key].data.copy_(torch.where(self.masks[key], value, value.new_zeros(())))
        return before, best, epochs

    def _copies(self) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in self.masters.items()}

    def _learn(self, number: int, adam: torch.optim.Optimizer) -> None:
        with torch.enable_grad():
            found = torch.autograd.grad(self._error(number), list(self.masters.values()))
        for master, gradient in zip(self.masters.values(), found, strict=True):
            master.grad = gradient
        adam.step()

    @torch.no_grad()
    def _judged(self) -> float:
        """Mean error over the batches that choose."""
        sizes = [self._rows(i, self.goals[i]).numel() for i in self.judge]
        errors = torch.stack([self._error(i).double() * size for i, size in zip(self.judge, sizes, strict=True)])
        return float(errors.sum()) / sum(sizes)

    def _error(self, number: int) -> Tensor:
        """Mean square by which a batch misses the original's, relative to it."""
        weights = {
            key: (master * self.masks[key]).to(self.parameters[key].dtype) for key, master in self.masters.items()
        }

        def block(*args: object, **kwargs: object) -> object:
            return functional_call(self.block, weights, args, dict(kwargs))

        call = self.calls[number]
        found = self._rows(
            number, read_parts(lambda h: call.run(block, h), self.hidden(number), [self.part])[0][self.side]
        )
        goal = self._rows(number, self.goals[number])
        square = (found - goal).square()
        if self.how.normalise == "token":
            own = goal.square().mean(-1, keepdim=True)
            return (square / (own + FLOOR * self.scale)).mean()
        return (square / self.scale).mean()

    def _rows(self, number: int, value: Tensor) -> Tensor:
        """Tokens that are no padding, [tokens, width], at least in float32."""
        rows = without_padding(value, self.tokens[number]).reshape(-1, value.shape[-1])
        return rows.to(torch.promote_types(value.dtype, torch.float32))

    def _scale(self) -> Tensor:
        """What squares of errors are divided by."""
        sums, count = torch.zeros((), device=self.goals[0].device), 0
        for i in self.learn:
            rows = self._rows(i, self.goals[i])
            sums, count = sums + rows.square().sum(0), count + len(rows)
        mean = sums / max(count, 1)
        total = mean.mean().clamp(min=1e-30)
        return mean + FLOOR * total if self.how.normalise == "coordinate" else total
