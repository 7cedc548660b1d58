"""RigL: what comes back has the largest gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from secateur.criteria.sums import reduce_spans
from secateur.training.regrowth.base import Regrowth, register
from secateur.types import Group


@register
@dataclass(frozen=True, kw_only=True)
class RigL(Regrowth):
    """The smallest weights go, and those masked ones come back whose loss gradient is largest.

    Gradients are those that the loop has just computed, of masked weights as well; a bad choice where batches are tiny,
    whose gradients are noise. What goes may come back at once.

    Source:
        Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", 2020, section 3.
    """

    name: ClassVar[str] = "rigl"
    summary: ClassVar[str] = "those come back whose gradient is largest"
    needs_gradients: ClassVar[bool] = True

    def wish(self, group: Group, gradients: Mapping[str, Tensor], generator: Generator) -> Tensor:
        """Summed size of the gradients of every unit."""
        return reduce_spans(gradients, group).float()
