"""Rectangular blocks of the weight matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.errors import RecipeError
from secateur.kinds.weights.granularity import Granularity, register
from secateur.kinds.weights.weight import Weight
from secateur.registry import whole_number
from secateur.types import Group


@register
@dataclass(frozen=True, kw_only=True)
class Block(Granularity):
    """Blocks of r outputs times c inputs of the weight seen as the matrix [out, in * kernel].

    What block-sparse kernels can skip. Blocks at the right and lower edge are smaller where the shape does
    not divide the matrix; they are units like the others, so compare them with a mean, not with a sum.

    Args:
        shape: (r, c) in elements.

    Raises:
        RecipeError: a shape that is not two positive whole numbers.

    Source:
        Narang, Undersander, Diamos, "Block-Sparse Recurrent Neural Networks", 2017, section 3.
    """

    name: ClassVar[str] = "block"
    summary: ClassVar[str] = "blocks of r x c weights of the matrix [out, in * kernel]"

    shape: Sequence[int] = (4, 4)

    def __post_init__(self) -> None:
        """Refuse anything but two sizes."""
        if isinstance(self.shape, str) or len(self.shape) != 2:
            raise RecipeError(f"shape={self.shape!r} is not (rows, columns)", hint="for example [4, 4]")
        object.__setattr__(self, "shape", tuple(whole_number("shape", size, least=1) for size in self.shape))

    def group(self, weight: Weight) -> Group:
        """(blocks along out, blocks along in * kernel) units."""
        out, *rest = weight.matrix_shape
        r, c = self.shape
        width = math.prod(rest)
        shape = (-(-out // r), -(-width // c))
        column = (torch.arange(width) // c).view(1, *rest)
        row = (torch.arange(out) // r).view(out, *[1] * len(rest))
        return weight.group(self.name, shape, row * shape[1] + column, block=(r, c))
