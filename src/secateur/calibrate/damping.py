"""Damping chosen by the data: the one whose predictions come true on samples that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.calibrate.gradient_rows import mean_loss, unflatten
from secateur.calibrate.inverse import Curvature
from secateur.types import Batch, Loss

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
REMOVED = 0.02
REMOVALS = 4


@dataclass(frozen=True)
class Trial:
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
    def error(self) -> float:
        """Sum of the absolute differences; infinite where the loss blew up."""
        total = sum(abs(p - t) for p, t in zip(self.predicted, self.true, strict=True))
        return total if total == total else float("inf")


def choose_damping(
    builder: Callable[[float], Curvature],
    mean: float,
    weights_d: Tensor,
    alive_d: Tensor,
    model: nn.Module,
    loss: Loss,
    names: Sequence[str],
    kept: Sequence[tuple[Batch, int]],
    *,
    seed: int = 0,
) -> tuple[float, tuple[Trial, ...]]:
    """Try dampings on a few small random removals, each with its update of the survivors.

    Args:
        builder: absolute damping -> inverse curvature.
        mean: mean of the curvature's diagonal.
        weights_d: the weights as one vector.
        alive_d: False where a weight is pruned already.
        model: in eval mode; its weights are replaced during the forward passes only.
        loss: ``loss(model, batch) -> scalar``.
        names: parameters, in the order of the vector.
        kept: held-out (batch, samples) pairs.
        seed: of the removals.

    Returns:
        The damping relative to `mean` with the smallest error (the larger one of equals), and all trials.

    Cost:
        Grid x removals forward passes over the held-out samples (6 x 4), and as many removals.
    """
    generator = torch.Generator().manual_seed(seed)
    keeps = []
    for _ in range(REMOVALS):
        drawn = torch.rand(len(weights_d), generator=generator).to(weights_d.device)
        keeps.append((drawn >= max(REMOVED, 1.0 / len(weights_d))) & alive_d)
    before = mean_loss(model, loss, kept, {})
    trials = []
    for damping in GRID:
        curvature = builder(damping * mean)
        outcomes = [curvature.remove(weights_d, keep_d) for keep_d in keeps]
        true = [mean_loss(model, loss, kept, unflatten(new, model, names)) - before for new, _ in outcomes]
        trials.append(Trial(damping, tuple(predicted for _, predicted in outcomes), tuple(true)))
    best = min(reversed(trials), key=lambda trial: trial.error)
    return best.damping, tuple(trials)
