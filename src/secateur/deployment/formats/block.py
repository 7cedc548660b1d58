"""Columns of sixteen rows, each there or not: for masks that remove weights in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.deployment.formats.base import FORMATS, Format, Parts, padded, starts, stored


@FORMATS.register("block")
class BlockFormat(Format):
    """Blocks of 16 rows x 1 column: one index per block, and one input for all of its rows.

    A block is stored whole where any number of it is there.
    """

    name = "block"
    parts = ("values", "columns", "offsets")
    kernel = 4
    height = 16

    def _pack(self, weight: Tensor) -> Parts:
        whole = padded(weight, self.height, 1)
        laid = whole.reshape(-1, self.height, whole.shape[1]).transpose(1, 2).contiguous()
        kept = stored(laid).any(-1)
        return laid[kept], kept.nonzero()[:, 1].int(), starts(kept.sum(1))

    def unpack(self, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """The matrix that was packed."""
        values, column, offsets = parts
        laid = values.new_zeros(len(offsets) - 1, columns, self.height)
        panel = torch.repeat_interleave(offsets.diff())
        laid[panel, column.long()] = values
        return laid.transpose(1, 2).flatten(0, 1)[:rows].contiguous()
