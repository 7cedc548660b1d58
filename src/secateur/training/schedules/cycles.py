"""Cycles: prune, train on, prune again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.registry import whole_number
from secateur.training.schedules.base import Stepwise, register


@register
@dataclass(frozen=True, kw_only=True)
class Cycles(Stepwise):
    """`rounds` cuts, equally far apart from `begin` to `end`, each of the same share of what is left.

    Iterative pruning: between two cuts lies a round of training, long enough to recover; train on after `end` too. Ten
    rounds to 89.3 % take a fifth each. A bad choice where rounds are short: cut by cut the loss then adds up.

    Args:
        rounds: number of cuts; `every` is not asked.

    Source:
        Han et al., "Learning both Weights and Connections", 2015; the equal shares as in Frankle and Carbin, "The
        Lottery Ticket Hypothesis", 2019.

    Example:
        >>> [Cycles(final=0.75, end=4, rounds=2).at(step) for step in range(5)]
        [0.5, 0.5, 0.5, 0.5, 0.75]
    """

    name: ClassVar[str] = "cycles"
    summary: ClassVar[str] = "prune, train on, prune again: each cut takes the same share of what is left"

    rounds: int = 5

    def __post_init__(self) -> None:
        """At least one round."""
        super().__post_init__()
        whole_number("rounds", self.rounds, least=1)

    @property
    def cuts(self) -> int:
        """`rounds`."""
        return self.rounds

    def after(self, cut: int) -> float:
        """Density d_i (d_f / d_i)^(cut / rounds)."""
        dense, sparse = 1 - self.initial, 1 - self.final
        return float(1 - dense * (sparse / dense) ** (cut / self.rounds))
