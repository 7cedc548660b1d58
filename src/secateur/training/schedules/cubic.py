"""Cubic: fast while there is much to spare, slow at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.training.schedules.base import Schedule, register


@register
@dataclass(frozen=True, kw_only=True)
class Cubic(Schedule):
    """s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3: most goes early, and the last updates are small.

    The usual choice. A bad one for a model that is far from trained at `begin`: a fifth of the time takes half.

    Source:
        Zhu and Gupta, "To prune, or not to prune", 2017, equation 1.

    Example:
        >>> [round(Cubic(final=0.9, end=10).at(step), 4) for step in (0, 1, 5, 9, 10)]
        [0.0, 0.2439, 0.7875, 0.8991, 0.9]
    """

    name: ClassVar[str] = "cubic"
    summary: ClassVar[str] = "fast at first, slow at the end (Zhu and Gupta)"

    def between(self, time: float) -> float:
        """Equation 1."""
        left = 1 - time
        # Products and not a power: they rise and fall with their factor, to the last bit.
        return self.final + (self.initial - self.final) * (left * left * left)
