"""Linear: the same share of all weights per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.training.schedules.base import Schedule, register


@register
@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Sparsity rises by the same amount with every update.

    Example:
        >>> [Linear(final=0.5, end=2).at(step) for step in range(3)]
        [0.0, 0.25, 0.5]
    """

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "the same share of all units per update"

    def between(self, time: float) -> float:
        """On the straight line."""
        return self.initial + (self.final - self.initial) * time
