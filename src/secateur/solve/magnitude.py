"""The smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.solve.base import SOLVERS, Problem
from secateur.solve.scored import ScoredSolver


@SOLVERS.register("magnitude")
@dataclass(frozen=True, kw_only=True)
class MagnitudeSolver(ScoredSolver):
    """Score |W|. A bad choice for language models, whose inputs differ in size by orders of magnitude."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "the smallest weights go"

    def score(self, problem: Problem) -> Tensor:
        """See `Scored.score`."""
        return problem.weight.abs()
