"""Wanda with the weight taken relative to its row and its column, so that no whole channel is cut off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.solve.base import SOLVERS, Problem
from secateur.solve.scored import ScoredSolver


@SOLVERS.register("ria")
@dataclass(frozen=True, kw_only=True)
class RiaSolver(ScoredSolver):
    """Score (|W_ij| / column sum + |W_ij| / row sum) * input norm ** power.

    Args:
        power: of the input's norm.

    Source:
        Zhang, Bai, Lin, Zhao, Hou, Cannistraci, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
        Language Models", 2024, equations 4 and 5.
    """

    name: ClassVar[str] = "ria"
    summary: ClassVar[str] = "relative importance in row and column, times the root of the input's norm"
    power: float = 0.5

    def score(self, problem: Problem) -> Tensor:
        """See `Scored.score`."""
        size = problem.weight.abs()
        least = float(size.mean()) * 1e-30  # a row or column of zeros is no division by zero
        relative = size / (size.sum(0, keepdim=True) + least) + size / (size.sum(1, keepdim=True) + least)
        return relative * problem.moments.norms**self.power
