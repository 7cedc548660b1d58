"""Custom: any function of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import RecipeError
from secateur.training.schedules.base import Schedule, Shape, register


@register
@dataclass(frozen=True, kw_only=True)
class Custom(Schedule):
    """A function of your own from the share of the time that is gone to the share of the way, both from 0 to 1.

    It need not rise, nor meet the ends: what `at` gives stays between `initial` and `final`, and is `final` at `end`.

    Args:
        shape: the function; no option, since no file can hold it.

    Raises:
        RecipeError: it returned something that is no number.

    Example:
        >>> Custom(final=0.8, end=2, shape=lambda time: time**2).at(1)
        0.2
    """

    name: ClassVar[str] = "custom"
    summary: ClassVar[str] = "a function of your own"
    live: ClassVar[frozenset[str]] = frozenset({"shape"})

    shape: Shape = lambda time: time

    def between(self, time: float) -> float:
        """What the function says."""
        share = self.shape(time)
        if not isinstance(share, (int, float)) or share != share:
            raise RecipeError(f"the schedule returned {share!r} at {time:g} of the time", hint="a share in [0, 1]")
        return self.initial + (self.final - self.initial) * float(share)
