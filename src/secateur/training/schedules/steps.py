"""Constant steps: the same share of all weights at every cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.registry import whole_number
from secateur.training.schedules.base import Stepwise, register


@register
@dataclass(frozen=True, kw_only=True)
class Steps(Stepwise):
    """`count` cuts, equally far apart from `begin` to `end`, each of the same share of all units.

    The last cuts are the hardest: from 80 to 90 % goes half of what is left. `Cycles` takes equal shares of that.

    Args:
        count: number of cuts; `every` is not asked.

    Example:
        >>> [Steps(final=0.75, end=4, count=3).at(step) for step in range(5)]
        [0.25, 0.25, 0.5, 0.5, 0.75]
    """

    name: ClassVar[str] = "steps"
    summary: ClassVar[str] = "a few cuts, each of the same share of all units"

    count: int = 5

    def __post_init__(self) -> None:
        """At least one cut."""
        super().__post_init__()
        whole_number("count", self.count, least=1)

    @property
    def cuts(self) -> int:
        """`count`."""
        return self.count

    def after(self, cut: int) -> float:
        """Equal steps from `initial` to `final`."""
        return self.initial + (self.final - self.initial) * cut / self.count
