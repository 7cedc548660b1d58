"""Damping chosen by the data: the one whose removals, with their updates, cost least on unseen samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.statistics.curvature.inverse import Curvature
from secateur.statistics.gradients.functional import CountedBatch, mean_loss
from secateur.statistics.gradients.gradient_rows import unflatten
from secateur.types import Loss

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FRACTIONS = (0.25, 0.5)


@dataclass(frozen=True)
class DampingTrial:
    """One damping that was tried.

    Args:
        damping: relative to the mean curvature.
        predicted: loss change that the quadratic model predicts, per removal.
        true: loss change on the held-out samples, per removal.
    """

    damping: float
    predicted: tuple[float, ...]
    true: tuple[float, ...]

    @property
    def cost(self) -> float:
        """Sum of the true changes; infinite where the loss blew up."""
        total = sum(self.true)
        return total if total == total else float("inf")


def choose_damping(
    builder: Callable[[float], Curvature],
    mean: float,
    weights_d: Tensor,
    alive_d: Tensor,
    model: nn.Module,
    loss: Loss,
    names: Sequence[str],
    kept: Sequence[CountedBatch],
) -> tuple[float, tuple[DampingTrial, ...]]:
    """Try dampings at the work itself: remove what each scores lowest, update the rest, look at the loss.

    Choosing by the distance between predicted and true changes was tried too and chose worse: a damping far
    too large predicts its own poor updates well. The predictions are kept in the trials all the same.

    Args:
        builder: absolute damping -> inverse curvature.
        mean: mean of the curvature's diagonal.
        weights_d: the weights as one vector.
        alive_d: False where a weight is pruned already.
        model: in eval mode; its weights are replaced during the forward passes only.
        loss: ``loss(model, batch) -> scalar``.
        names: parameters, in the order of the vector.
        kept: held-out (batch, samples) pairs.

    Returns:
        The damping relative to `mean` whose removals of 25 and 50 % of the living weights cost least (the
        larger one of equals), and all trials.

    Cost:
        Thirteen forward passes over the held-out samples; six factorisations and twelve removals.
    """
    before = mean_loss(model, loss, kept, {})
    alive = int(alive_d.sum())
    trials = []
    for damping in GRID:
        curvature = builder(damping * mean)
        scores = weights_d.to(torch.float64).square() / curvature.inverse_diagonal()
        order = torch.argsort(torch.where(alive_d, scores, -1.0), stable=True)
        predicted, true = [], []
        for fraction in FRACTIONS:
            keep_d = alive_d.clone()
            keep_d[order[: len(order) - alive + round(fraction * alive)]] = False
            new, cost = curvature.remove(weights_d, keep_d)
            predicted.append(cost)
            true.append(mean_loss(model, loss, kept, unflatten(new, model, names)) - before)
        trials.append(DampingTrial(damping, tuple(predicted), tuple(true)))
    best = min(reversed(trials), key=lambda trial: trial.cost)
    return best.damping, tuple(trials)
