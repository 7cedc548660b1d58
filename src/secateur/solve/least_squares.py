"""Masked least squares: the best weights under any mask, by conjugate gradients with the diagonal as preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.solve.base import SOLVERS, Problem, Solved, Solver
from secateur.solve.moments import SecondMoments


@SOLVERS.register("least_squares")
@dataclass(frozen=True, kw_only=True)
class LeastSquares(Solver):
    """The mask of a score, and then the weights that make up best for what is gone.

    Args:
        mask: name of the solver that chooses the mask.
        steps: of conjugate gradients.
    """

    name: ClassVar[str] = "least_squares"
    summary: ClassVar[str] = "the mask of another solver, then masked least squares"
    mask: str = "wanda"
    steps: int = 20

    def __post_init__(self) -> None:
        """Refuse an unknown mask before anything long starts."""
        if self.mask == self.name:
            raise RecipeError("mask='least_squares' chooses none", hint="for example wanda")
        SOLVERS.find(self.mask)

    def solve(self, problem: Problem) -> Solved:
        """See `Solver.solve`."""
        found = SOLVERS.find(self.mask)().solve(problem)
        return Solved.of(polish(problem.weight, found.weight, found.mask, problem.moments, self.steps), found.mask)


def polish(
    target: Tensor,
    start: Tensor,
    mask: Tensor,
    moments: SecondMoments,
    steps: int,
    *,
    tolerance: float = 1e-3,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Minimise tr((target - V) H (target - V)^T) over V under a mask, from V = start.

    Args:
        target: W, [o, d].
        start: where to begin, [o, d].
        mask: bool [o, d], True = keep.
        moments: H, damped.
        steps: at most so many.
        tolerance: stop where the residual has fallen to this share of the first; every row by itself stands still then.
        watch: called with V after every step.

    Returns:
        V, zero where the mask is False.

    Cost:
        o d^2 multiplications per step.
    """
    hessian, keep = moments.normalised, mask.to(target.dtype)
    goal = target * moments.scale
    found = start * moments.scale * keep
    residual = ((goal - found) @ hessian) * keep
    # In coordinates of a unit diagonal the preconditioner is the identity.
    direction, size = residual, (residual * residual).sum(1)
    small = size * tolerance**2
    for _ in range(steps):
        image = direction @ hessian * keep
        bend = (direction * image).sum(1)
        # Rows that are there already, or all of whose weights are gone, stand still.
        moves = (size > small) & (bend > 0)
        if not bool(moves.any()):
            break
        step = torch.where(moves, size / torch.where(moves, bend, torch.ones_like(bend)), torch.zeros_like(size))
        found = found + step[:, None] * direction
        residual = residual - step[:, None] * image
        after = (residual * residual).sum(1)
        grown = torch.where(moves, after / torch.where(moves, size, torch.ones_like(size)), torch.zeros_like(size))
        direction = residual + grown[:, None] * direction
        size = torch.where(moves, after, size)
        if watch is not None:
            watch(found / moments.scale)
    return found / moments.scale
