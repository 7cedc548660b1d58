"""Masks by a score; the weights that stay are not moved."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.solve.base import Problem, Solved, Solver


@dataclass(frozen=True, kw_only=True)
class ScoredSolver(Solver):
    """Base of all solvers that score weights and leave them as they are."""

    needs_gram: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    @abstractmethod
    def score(self, problem: Problem) -> Tensor:
        """Score of every weight, [o, d], higher = keep."""

    def solve(self, problem: Problem) -> Solved:
        """See `Solver.solve`."""
        return Solved.of(problem.weight, problem.pattern.keep(self.score(problem)))
