"""Exponential: the same share of what is left per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.training.schedules.base import Schedule, register


@register
@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """Density, 1 - sparsity, falls by the same factor with every update.

    Between linear and cubic at its beginning; it never takes more than the same share of what is left.

    Example:
        >>> [Exponential(final=0.75, end=2).at(step) for step in range(3)]
        [0.0, 0.5, 0.75]
    """

    name: ClassVar[str] = "exponential"
    summary: ClassVar[str] = "the same share of what is left per update"

    def between(self, time: float) -> float:
        """Density d_i (d_f / d_i)^time."""
        dense, sparse = 1 - self.initial, 1 - self.final
        return float(1 - dense * (sparse / dense) ** time)
