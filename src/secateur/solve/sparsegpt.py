"""SparseGPT: from the first column to the last, what each pruned column costs is made good in those that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import RecipeError, UnsupportedError
from secateur.solve.base import SOLVERS, Problem, Solved, Solver
from secateur.solve.patterns import BlockPattern, Fixed, NofM, Pattern, PerLayer, PerRow


@SOLVERS.register("sparsegpt")
@dataclass(frozen=True, kw_only=True)
class SparseGpt(Solver):
    """Columns are pruned in order; the mask is chosen per block of columns, by W^2 / [H^-1]_jj of what is left.

    As published, but for counts: they are exact, where the authors' code removes one weight too many per block and
    more where scores are equal.

    Args:
        block: columns whose mask is chosen at once.

    Source:
        Frantar, Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", 2023, algorithm 1.
    """

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "column by column, the error made good in the columns that follow"
    block: int = 128

    def __post_init__(self) -> None:
        """Refuse blocks of no column."""
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise RecipeError(f"block={self.block!r} is not a whole number of at least 1")

    def solve(self, problem: Problem) -> Solved:
        """See `Solver.solve`."""
        weight, upper, pattern = problem.weight.clone(), problem.moments.upper, problem.pattern
        weight[:, problem.moments.dead] = 0
        rows, columns = weight.shape
        mask = torch.ones_like(weight, dtype=torch.bool)
        # n:m is decided run by run, and a run must not be cut by the edge of a block.
        width = self.block if not isinstance(pattern, NofM) else max(self.block // pattern.m, 1) * pattern.m
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            if not isinstance(pattern, NofM):
                score = (weight[:, start:stop] / upper.diagonal()[start:stop]) ** 2
                mask[:, start:stop] = _part(pattern, start, stop, (rows, columns)).keep(score)
            errors = self._columns(weight, mask, upper, pattern, (start, stop))
            weight[:, stop:] -= errors @ upper[start:stop, stop:]
        return Solved.of(weight, mask)

    @staticmethod
    def _columns(weight: Tensor, mask: Tensor, upper: Tensor, pattern: Pattern, span: tuple[int, int]) -> Tensor:
        """Prune the columns of one block in order, in place; their errors, [o, columns of the block]."""
        start, stop = span
        errors = weight.new_zeros(len(weight), stop - start)
        for j in range(start, stop):
            if isinstance(pattern, NofM) and j % pattern.m == 0 and j + pattern.m <= weight.shape[1]:
                run = slice(j, j + pattern.m)
                mask[:, run] = pattern.keep((weight[:, run] / upper.diagonal()[run]) ** 2)
            left = torch.where(mask[:, j], weight[:, j], weight.new_zeros(()))
            error = (weight[:, j] - left) / upper[j, j]
            weight[:, j + 1 : stop] -= torch.outer(error, upper[j, j + 1 : stop])
            weight[:, j] = left
            errors[:, j - start] = error
        return errors


def _part(pattern: Pattern, start: int, stop: int, shape: tuple[int, int]) -> Pattern:
    """The share of a pattern that falls on some columns; shares of all blocks add up to the whole count."""

    def share(count: int) -> int:
        return count * stop // shape[1] - count * start // shape[1]

    if isinstance(pattern, PerLayer):
        return PerLayer(share(pattern.count))
    if isinstance(pattern, PerRow):
        return PerRow(share(pattern.count))
    if isinstance(pattern, Fixed):
        return Fixed(pattern.mask[:, start:stop])
    what = "blocks" if isinstance(pattern, BlockPattern) else type(pattern).__name__
    raise UnsupportedError(
        f"SparseGPT cannot choose {what}", why="it decides column by column", hint="use criterion admm"
    )
