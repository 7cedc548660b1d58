"""1-swap refinement: one pruned and one kept weight of a row change places as long as that lowers the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.solve.base import SOLVERS, Problem, Solved, Solver
from secateur.solve.patterns import NofM


@SOLVERS.register("swap")
@dataclass(frozen=True, kw_only=True)
class Swap(Solver):
    """The mask of another solver, refined by swaps; weights are not moved.

    Args:
        mask: name of the solver that chooses the first mask, one that does not move weights.
        rounds: swaps per row at most.

    Cost:
        Per round and row d^2 comparisons for free masks; rows go one by one.
    """

    name: ClassVar[str] = "swap"
    summary: ClassVar[str] = "swaps of one pruned and one kept weight of a row that lower the error"
    moves: ClassVar[bool] = False
    mask: str = "wanda"
    rounds: int = 100

    def __post_init__(self) -> None:
        """Refuse a first mask that is none, or comes with moved weights."""
        if self.mask == self.name or SOLVERS.find(self.mask).moves:
            raise RecipeError(f"mask={self.mask!r} does not leave weights as they are", hint="for example wanda")

    def solve(self, problem: Problem) -> Solved:
        """See `Solver.solve`."""
        first = SOLVERS.find(self.mask)().solve(problem).mask
        run = problem.pattern.m if isinstance(problem.pattern, NofM) else None
        mask = refine(problem.weight, first, problem.moments.gram, rounds=self.rounds, run=run)
        return Solved.of(problem.weight, mask)


def refine(weight: Tensor, mask: Tensor, gram: Tensor, *, rounds: int = 100, run: int | None = None) -> Tensor:
    """A mask with as many kept weights in every row, and no larger error.

    Args:
        weight: [o, d].
        mask: bool [o, d], True = keep.
        gram: H, [d, d].
        rounds: swaps per row at most.
        run: swaps stay inside runs of so many inputs (n:m).

    Returns:
        the refined mask.
    """
    mask, diagonal = mask.clone(), gram.diagonal()
    place = torch.arange(weight.shape[1], device=weight.device)
    apart = None if run is None else (place[:, None] // run) != (place[None, :] // run)
    for row in range(len(weight)):
        w, keep = weight[row], mask[row]
        slope = gram @ torch.where(keep, torch.zeros_like(w), w)
        for _ in range(rounds):
            # Taking u back lowers the error by the first line, giving q up raises it by the second; the last term is
            # what the two have in common.
            back = (-2 * w * slope + w**2 * diagonal).masked_fill(keep, torch.inf)
            gone = (2 * w * slope + w**2 * diagonal).masked_fill(~keep, torch.inf)
            change = back[:, None] + gone[None, :] - 2 * torch.outer(w, w) * gram
            if apart is not None:
                change = change.masked_fill(apart, torch.inf)
            best = int(change.argmin())
            taken, given = divmod(best, len(w))
            # Rounding alone must not let two weights change places for ever.
            if not float(change.reshape(-1)[best]) < -1e-9 * float((w**2 * diagonal).sum()):
                break
            keep[taken], keep[given] = True, False
            slope = slope - gram[:, taken] * w[taken] + gram[:, given] * w[given]
    return mask
