"""Weights that contribute least to the outputs go: magnitude times the size of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.solve.base import SOLVERS, Problem
from secateur.solve.scored import ScoredSolver


@SOLVERS.register("wanda")
@dataclass(frozen=True, kw_only=True)
class WandaSolver(ScoredSolver):
    """Score |W_ij| * root mean square of input j. Compared inside each row it is what was published.

    Source:
        Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023, equation 1.
    """

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "magnitude times the root mean square of the input"

    def score(self, problem: Problem) -> Tensor:
        """See `Scored.score`."""
        return problem.weight.abs() * problem.moments.norms
