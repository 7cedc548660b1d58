"""Rows, columns and strips of the weight matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from secateur.kinds.weights.granularity import Granularity, register
from secateur.kinds.weights.weight import Weight
from secateur.registry import one_of, whole_number
from secateur.types import Group


@register
@dataclass(frozen=True, kw_only=True)
class Vector(Granularity):
    """A line of the weight seen as the matrix [out, in * kernel].

    A "row" makes one output (one filter), a "column" is one input at one kernel position in all outputs, a
    "strip" is `length` neighbours in a row (with the width of the kernel as length: one row of a 2-D kernel).
    Rows and columns are zeros only: to remove them from the network, and what is coupled to them, use
    granularity channel.

    Args:
        axis: "row", "column" or "strip".
        length: elements of a strip; the last strip of a row is shorter where the length does not divide the
            row. Without meaning for rows and columns.

    Raises:
        RecipeError: unknown axis, or a length that is not a positive whole number.

    Source:
        Mao, Han, Pool, Li, Liu, Wang, Dally, "Exploring the Granularity of Sparsity in Convolutional Neural
        Networks", 2017, section 3.
    """

    name: ClassVar[str] = "vector"
    summary: ClassVar[str] = "rows, columns or strips of the matrix [out, in * kernel]"

    axis: Literal["row", "column", "strip"] = "row"
    length: int = 4

    def __post_init__(self) -> None:
        """Refuse unknown words and sizes."""
        one_of("axis", self.axis, ("row", "column", "strip"))
        whole_number("length", self.length, least=1)

    def group(self, weight: Weight) -> Group:
        """Rows: (out,) units; columns: (in, *kernel); strips: (out, strips of a row)."""
        out, *rest = weight.matrix_shape
        ones = [1] * len(rest)
        if self.axis == "row":
            return weight.group(self.name, (out,), torch.arange(out).view(out, *ones), axis="row")
        width = math.prod(rest)
        if self.axis == "column":
            return weight.group(self.name, tuple(rest), torch.arange(width).view(1, *rest), axis="column")
        per_row = -(-width // self.length)
        strip = (torch.arange(width) // self.length).view(1, *rest)
        index = strip + per_row * torch.arange(out).view(out, *ones)
        return weight.group(self.name, (out, per_row), index, axis="strip", length=self.length)
