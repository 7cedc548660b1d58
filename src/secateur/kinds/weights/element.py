"""Single weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.kinds.weights.granularity import Granularity, register
from secateur.kinds.weights.weight import Weight
from secateur.types import Group


@register
@dataclass(frozen=True, kw_only=True)
class Element(Granularity):
    """Every weight is a unit of its own.

    The finest choice there is. A bad one where speed is wanted: dense kernels multiply the zeros as well.

    Source:
        Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """

    name: ClassVar[str] = "element"
    summary: ClassVar[str] = "single weights"
    single: ClassVar[bool] = True

    def group(self, weight: Weight) -> Group:
        """One unit per element; nothing is stored."""
        return weight.group(self.name, weight.shape, None)
