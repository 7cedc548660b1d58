"""Loss increase: what the measured loss says when a block, or a branch of one, is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.criteria.base import Context, Criterion, register
from secateur.criteria.depth.block_influence import best_where_locked
from secateur.errors import RecipeError
from secateur.model.call import default_loss
from secateur.model.guard import evaluating
from secateur.model.tensors import require_finite
from secateur.statistics.gradients.functional import batches
from secateur.structure.left_out import Unit, left_out, units_of
from secateur.types import Data, Group, Loss


@register
@dataclass(frozen=True, kw_only=True)
class LossIncrease(Criterion):
    """Score a block by the rise of the measured loss when it is left out.

    The most faithful criterion for one block; a bad choice without labelled data, or where time is short. A block
    that may not go scores as the best of the others.

    Of a language model the mean loss per token decides, and so does its exponential: greedy removal is that by
    perplexity, on the batches that it is given.

    Args:
        greedy: measure again after every removal, so that blocks that stand in for each other are not both taken;
            the scores are then the turns in which the blocks go, over all groups.
        turns: how many blocks are chosen so; those that are left follow in the order of the last measurement. Give
            the number of blocks that will go, which is enough; None = all. Only with greedy.
        per: "unit", or "params": the rise for each parameter that goes, which fits sub-blocks, of which an MLP holds
            several times as many as an attention, and targets in parameters.

    Raises:
        RecipeError: another granularity than layer and sub_block, no data, turns below 1 or without greedy, or
            an unknown per.
        NonFiniteError: the loss is NaN or Inf.

    Cost:
        One forward pass over the data per block. With greedy, n + (n - 1) + ... of them: t n - t (t - 1) / 2 for t of n
        blocks, 212 for 8 of 30, and about n^2 / 2 where turns are not limited; one more with per="params".

    Source:
        Leave-one-out; Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
        Transformer Blocks", 2024, algorithm 1 (greedy).
    """

    name: ClassVar[str] = "loss-increase"
    summary: ClassVar[str] = "measured rise of the loss when a block is left out"
    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels"})
    speed: ClassVar[str] = "slow for deep networks: forward passes, as many as blocks"
    best_for: ClassVar[str] = "layers, where labelled data and some time are at hand"
    comparable: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = ("layer", "sub_block")
    promises: ClassVar[frozenset[str]] = frozenset({"batch_split"})

    greedy: bool = False
    turns: int | None = None
    per: str = "unit"

    def __post_init__(self) -> None:
        """Refuse turns that mean nothing, and what nothing is divided by."""
        if self.per not in ("unit", "params"):
            raise RecipeError(f"loss-increase: per is {self.per!r}", hint="unit or params")
        if self.turns is None:
            return
        if type(self.turns) is not int or self.turns < 1:
            raise RecipeError(f"loss-increase: turns is {self.turns!r}", hint="turns is an integer of at least 1")
        if not self.greedy:
            raise RecipeError("loss-increase: turns without greedy mean nothing", hint="greedy: true, or no turns")

    def _score(self, context: Context) -> dict[str, Tensor]:
        model, data, loss = context.model, context.data, context.loss
        assert data is not None
        found = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in context.groups}
        sizes = {group.name: self._sizes(model, group) for group in context.groups}
        free = [
            (group.name, place, unit)
            for group in context.groups
            for place, unit in enumerate(units_of(group))
            if group.attributes["free"][place]
        ]
        if self.greedy:
            gone: list[Unit] = []
            losses: list[float] = []
            # Rises are what parameters divide; without them the order by losses is the same.
            now = loss_without(model, data, loss) if self.per == "params" else 0.0
            for turn in range(len(free) if self.turns is None else min(self.turns, len(free))):
                # Each turn measures all that are left: what stands in for what shows only once one of them has gone.
                measured = [loss_without(model, data, loss, without=[*gone, unit]) for _, _, unit in free]
                losses = [
                    (value - now) / sizes[group][place] for value, (group, place, _) in zip(measured, free, strict=True)
                ]
                first = min(range(len(losses)), key=losses.__getitem__)
                now = measured[first] if self.per == "params" else 0.0
                group, place, unit = free.pop(first)
                del losses[first]
                found[group][place] = turn  # turns, not losses: those of different turns start from different networks
                gone.append(unit)
            for rank, number in enumerate(sorted(range(len(free)), key=losses.__getitem__)):
                group, place, _ = free[number]
                found[group][place] = len(gone) + rank
        else:
            # Subtracted, so that "zero" means that nothing is lost; the order would be the same without.
            whole = loss_without(model, data, loss)
            for group, place, unit in free:
                found[group][place] = (loss_without(model, data, loss, without=[unit]) - whole) / sizes[group][place]
        return {group.name: best_where_locked(group, found[group.name]) for group in context.groups}

    def _sizes(self, model: nn.Module, group: Group) -> list[float]:
        """What the rise of every unit is divided by."""
        sizes = [0.0] * group.size
        if self.per == "unit":
            return [1.0] * group.size
        tensors = dict(model.named_parameters())
        for span in group.spans:
            assert span.index is not None  # one unit holds all of the tensor
            sizes[int(span.index.flatten()[0])] += tensors[span.tensor].numel()
        return [max(size, 1.0) for size in sizes]


def loss_without(model: nn.Module, data: Data, loss: Loss | None, *, without: Sequence[Unit] = ()) -> float:
    """Mean loss over the samples, in eval mode, without some blocks (as identity) or branches (not added).

    Raises:
        InputError: no batch.
        NonFiniteError: a loss that is not finite.
    """
    total, count = 0.0, 0
    with evaluating(model), left_out(model, without):
        for number, (batch, size) in enumerate(batches(model, data)):
            value = (loss or default_loss)(model, batch).detach()
            require_finite(value, "loss", what=f"batch {number}:")
            total, count = total + size * float(value), count + size
    return total / count
