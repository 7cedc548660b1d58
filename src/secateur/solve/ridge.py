"""How much a fit is pulled towards the weights that were there: as asked, or as batches that it has not seen like best.

Closed forms fit the sample that they are given. With hardly more rows than columns they fit its noise: of a language
model with 2,048 tokens of calibration and 1,016 inner neurons the pull that serves convolutions doubled the perplexity.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HELD = 4  # every so many batches one is held out
LEAST = 1e-4  # of the ridges that are tried, and the one that is taken where there are too few batches to hold one out
NAMED = 3  # layers that are named where a fit left them
LADDER = (LEAST, 1e-3, 1e-2, 0.1, 1.0)


class RefitWarning(UserWarning):
    """A refit left layers as they were cut."""


def warn_of_unfitted(names: Sequence[str], total: int) -> None:
    """Say which layers no fit made better on held-out batches; nothing where there are none.

    Args:
        names: of their weights.
        total: of the layers that were to be fitted.
    """
    if names:
        some = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        words = f"refit left {len(names)} of {total} layers as they were cut ({some})"
        warnings.warn(f"{words}: no fit made held-out batches better; more data may", RefitWarning, stacklevel=3)


def is_held(place: int, ridge: float | None) -> bool:
    """Whether a batch is held out.

    Args:
        place: its number, from 1.
        ridge: None where it is to be chosen.
    """
    return ridge is None and place % HELD == 0


def gained(change: Tensor, gram: Tensor, missing: Tensor) -> float:
    """By how much a change of the weights lowers the sum of squares of what is missing; below 0 where it raises it.

    Args:
        change: B, [..., k, n].
        gram: X^T X, [..., k, k].
        missing: X^T (Y - now), [..., k, n].
    """
    return float((change * (2 * missing - gram @ change)).sum())


def best_ridge(gain: Callable[[float], float]) -> float | None:
    """The ridge of the ladder whose fit gains most on held-out batches; None where no fit gains anything.

    Args:
        gain: of the fit with a ridge.

    Example:
        >>> best_ridge(lambda ridge: -abs(ridge - 0.1) + 0.05)
        0.1
        >>> best_ridge(lambda ridge: -ridge) is None
        True
    """
    gains = {ridge: gain(ridge) for ridge in LADDER}
    best = max(gains, key=lambda ridge: gains[ridge])
    return best if gains[best] > 0 else None


def zeros() -> Tensor:
    """A sum of nothing, whatever its shape will be."""
    return torch.zeros(())
