"""Loss increase: what the measured loss says when a block is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.criteria.base import Context, Criterion, register
from secateur.criteria.depth.block_influence import best_where_locked
from secateur.model.bypass import bypassed
from secateur.model.call import default_loss
from secateur.model.guard import evaluating
from secateur.model.tensors import require_finite
from secateur.statistics.gradients.functional import batches
from secateur.types import Data, Loss


@register
@dataclass(frozen=True, kw_only=True)
class LossIncrease(Criterion):
    """Score a block by the rise of the measured loss when it is left out.

    The most faithful criterion for one block; a bad choice without labelled data, or where time is short. A block
    that may not go scores as the best of the others.

    Args:
        greedy: measure again after every removal, so that blocks that stand in for each other are not both taken;
            the scores are then the turns in which the blocks go, over all groups.

    Raises:
        RecipeError: another granularity than layer, or no data.
        NonFiniteError: the loss is NaN or Inf.

    Cost:
        One forward pass over the data per block; with greedy one per pair of them, about.

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
    granularities: ClassVar[tuple[str, ...]] = ("layer",)
    promises: ClassVar[frozenset[str]] = frozenset({"batch_split"})

    greedy: bool = False

    def _score(self, context: Context) -> dict[str, Tensor]:
        model, data, loss = context.model, context.data, context.loss
        assert data is not None
        found = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in context.groups}
        free = [
            (group.name, place, group.attributes["blocks"][place])
            for group in context.groups
            for place in range(group.size)
            if group.attributes["free"][place]
        ]
        if self.greedy:
            gone: list[str] = []
            for turn in range(len(free)):
                # Each turn measures all that are left: what stands in for what shows only once one of them has gone.
                losses = [loss_without(model, data, loss, without=[*gone, name]) for _, _, name in free]
                group, place, name = free.pop(min(range(len(losses)), key=losses.__getitem__))
                found[group][place] = turn  # turns, not losses: those of different turns start from different networks
                gone.append(name)
        else:
            # Subtracted, so that "zero" means that nothing is lost; the order would be the same without.
            whole = loss_without(model, data, loss)
            for group, place, name in free:
                found[group][place] = loss_without(model, data, loss, without=[name]) - whole
        return {group.name: best_where_locked(group, found[group.name]) for group in context.groups}


def loss_without(model: nn.Module, data: Data, loss: Loss | None, *, without: Sequence[str] = ()) -> float:
    """Mean loss over the samples, in eval mode, with some modules as identity.

    Raises:
        InputError: no batch.
        NonFiniteError: a loss that is not finite.
    """
    total, count = 0.0, 0
    with evaluating(model), bypassed(model, without):
        for number, (batch, size) in enumerate(batches(model, data)):
            value = (loss or default_loss)(model, batch).detach()
            require_finite(value, "loss", what=f"batch {number}:")
            total, count = total + size * float(value), count + size
    return total / count
