"""Angular distance: the mean angle by which blocks (transformer layers) turn the hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion, register
from secateur.criteria.depth.block_influence import best_where_locked, mean_over_positions
from secateur.errors import RecipeError


@register
@dataclass(frozen=True, kw_only=True)
class AngularDistance(Criterion):
    """Score a block by the mean angle, in units of pi, by which it turns the hidden state.

    The idea is that of block influence, with large turns weighed less, and for neighbours that go together. A bad
    choice where positions matter very differently, for it averages over all of them.

    Formula: d_i = E arccos(cos(x_i, x_{i+n})) / pi over all positions of all samples but padding, n the span. With a
    span above 1 a block scores the smallest distance of all runs of n neighbours that it belongs to, so a target that
    removes n blocks takes the run with the smallest distance. A block without such a run scores 1, which is the
    largest, and one that may not go as the best of the others.

    Args:
        span: how many neighbouring blocks go together.

    Raises:
        RecipeError: a span below 1 or above the number of blocks, another granularity than layer and sub_block, or
            no data.
        NonFiniteError: a hidden state is NaN or Inf.

    Cost:
        One forward pass over the data; hidden states of `span` blocks are kept.

    Source:
        Gromov, Tirumala, Shapourian, Glorioso, Roberts, "The Unreasonable Ineffectiveness of the Deeper Layers",
        2024, equations 6 and 7.
    """

    name: ClassVar[str] = "angular-distance"
    summary: ClassVar[str] = "runs of blocks that turn the hidden state by the smallest angle matter least"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "fast: a forward pass, no labels"
    best_for: ClassVar[str] = "neighbouring layers of deep transformers that go together"
    comparable: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = ("layer", "sub_block")
    promises: ClassVar[frozenset[str]] = frozenset({"batch_split", "zero_lowest"})

    span: int = 1

    def __post_init__(self) -> None:
        """Refuse spans that are not whole and positive."""
        if type(self.span) is not int or self.span < 1:
            raise RecipeError(f"angular-distance: span is {self.span!r}", hint="span is an integer of at least 1")

    def _score(self, context: Context) -> dict[str, Tensor]:
        for group in context.groups:
            if self.span > group.size:
                raise RecipeError(f"span={self.span} does not fit the {group.size} blocks of {group.name!r}")
        found = mean_over_positions(context, lambda cosine: torch.arccos(cosine) / pi, span=self.span)
        return {group.name: best_where_locked(group, self._smallest(found[group.name])) for group in context.groups}

    def _smallest(self, distances: Tensor) -> Tensor:
        """For every block the smallest distance of the runs that it is in."""
        # A block in no run is worth the largest distance: nothing says that it could go.
        runs = torch.where(distances.isnan(), torch.ones_like(distances), distances)
        return torch.stack([runs[max(0, place - self.span + 1) : place + 1].min() for place in range(len(runs))])
