"""Every k-th block of a stack goes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion, Reads, register
from secateur.errors import RecipeError


@register
@dataclass(frozen=True, kw_only=True)
class Every(Criterion):
    """Every k-th block of a stack goes first, the deepest of them first; looks at nothing.

    A bad choice where blocks differ much, as the first and last ones of most networks do. Ask for a sparsity of 1/k
    to remove exactly every k-th.

    Args:
        k: distance of the blocks that go first; 2 = every other.

    Raises:
        RecipeError: k is no whole number above 0, or another granularity than layer and sub_block.

    Cost:
        None.

    Source:
        Fan, Grave, Joulin, "Reducing Transformer Depth on Demand with Structured Dropout", 2020, section 3.2.
    """

    name: ClassVar[str] = "every"
    summary: ClassVar[str] = "every k-th block goes first, the deepest of them first"
    speed: ClassVar[str] = "instant: nothing is read"
    best_for: ClassVar[str] = "layers, as the baseline that other criteria must beat"
    comparable: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = ("layer", "sub_block")
    reads: ClassVar[Reads] = "nothing"
    promises: ClassVar[frozenset[str]] = frozenset()

    k: int = 2

    def __post_init__(self) -> None:
        """Refuse distances that are not whole and positive."""
        if type(self.k) is not int or self.k < 1:
            raise RecipeError(f"every: k is {self.k!r}", hint="k is an integer of at least 1; 2 is every other block")

    def _score(self, context: Context) -> dict[str, Tensor]:
        found = {}
        for group in context.groups:
            place = torch.arange(1, group.size + 1)
            # Every k-th scores below 1 and the others above; within both the deepest is lowest.
            found[group.name] = (place % self.k != 0) + 1 - place / (group.size + 1)
        return found
