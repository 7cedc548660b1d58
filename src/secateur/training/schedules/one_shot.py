"""One shot: everything at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.training.schedules.base import Schedule, register


@register
@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """All at `begin`; `end` and `every` are not asked. The cheapest, and a bad choice above about half of the weights.

    Example:
        >>> [OneShot(final=0.5, begin=2).at(step) for step in range(4)]
        [0.0, 0.0, 0.5, 0.5]
    """

    name: ClassVar[str] = "one_shot"
    summary: ClassVar[str] = "everything at once"

    def __post_init__(self) -> None:
        """One update, at `begin`."""
        object.__setattr__(self, "end", self.begin)
        super().__post_init__()

    def between(self, time: float) -> float:
        """Nothing lies between."""
        return self.final
