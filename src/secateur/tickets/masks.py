"""The masks of a ticket, and of the controls that it is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.api import score
from secateur.masks.units import Masks
from secateur.planning import make_plan
from secateur.planning.build import CriterionLike
from secateur.training.masking import stuck
from secateur.types import Data, Loss


def levels(target: float, rate: float) -> list[float]:
    """Sparsity after each round: 1 - (1 - rate)^r, and exactly `target` in the last one.

    Example:
        >>> [round(level, 4) for level in levels(0.5, 0.2)]
        [0.2, 0.36, 0.488, 0.5]
    """
    found: list[float] = []
    # 1 - 0.8 is a little less than 0.2 in floats, which is no reason for another round.
    while not found or found[-1] < target - 1e-9:
        found.append(1 - (1 - rate) ** (len(found) + 1))
    return [*found[:-1], target]


def next_masks(
    model: nn.Module,
    before: Mapping[str, Tensor],
    sparsity: float,
    *,
    criterion: CriterionLike,
    scope: str,
    protect: Sequence[str],
    data: Data | None,
    loss: Loss | None,
    seed: int,
) -> Masks:
    """Masks of a trained network at a sparsity; what was masked stays masked.

    Args:
        model: after training, with zeros where `before` has them.
        before: masks of the round before; empty at first.
        sparsity: of all weights that compete.
        criterion: scores single weights.
        scope: "global" or "local".
        protect: names or patterns that stay whole.
        data: batches, where the criterion needs them.
        loss: of the batches.
        seed: of everything random.
    """
    found = score(
        model, criterion=criterion, granularity="element", data=data, loss=loss, protect=tuple(protect), seed=seed
    )
    scores = stuck(found, {name: mask.view_as(found[name]) for name, mask in before.items()})
    plan = make_plan(
        model, target={"sparsity": sparsity}, granularity="element", scope=scope, protect=tuple(protect), scores=scores,
        min_keep=1,
    )  # fmt: skip
    return {name: mask.clone() for name, mask in plan.masks.items()}


def shuffled(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """The same number of weights in every layer, at other places."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, mask in sorted(masks.items()):
        order = torch.randperm(mask.numel(), generator=generator)
        found[name] = mask.flatten()[order].view_as(mask)
    return found


def drawn_masks(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """The same number of weights in all, drawn from all layers alike."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.cat([mask.flatten() for _, mask in sorted(masks.items())])
    whole = whole[torch.randperm(whole.numel(), generator=generator)]
    sizes = [mask.numel() for _, mask in sorted(masks.items())]
    parts = torch.split(whole, sizes)
    return {name: part.view_as(mask) for (name, mask), part in zip(sorted(masks.items()), parts, strict=True)}
