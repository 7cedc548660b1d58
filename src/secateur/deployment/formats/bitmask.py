"""One bit per number says whether it is there; the numbers that are follow each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from secateur.deployment.formats.base import FORMATS, Format, Parts, from_bytes, padded, starts, stored, to_bytes
from secateur.deployment.formats.dense import STEP, matrix, panels
from secateur.errors import InputError

SLACK = 16  # zeros behind the last number: a kernel loads whole vectors


@FORMATS.register("bitmask")
class Bitmask(Format):
    """A bit per slot: the fewest bytes from 40 % to 85 % of zeros, and work that does not shrink with them.

    Panels of eight rows; masks and numbers are each one stream in the order panel, step of 16 columns, row.
    """

    name = "bitmask"
    parts = ("values", "masks", "offsets")
    kernel = 1
    height = 8

    def _pack(self, weight: Tensor) -> Parts:
        laid = panels(padded(weight, self.height, STEP), self.height).contiguous()
        kept = stored(laid)
        values = functional.pad(laid[kept], (0, SLACK))
        return values, to_bytes(kept), starts(kept.flatten(1).sum(1))

    def unpack(self, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """The matrix that was packed."""
        values, masks, _ = parts
        kept = from_bytes(masks)
        count = int(kept.sum())
        if len(values) != count + SLACK:
            raise InputError(f"the masks count {count} numbers, and {len(values) - SLACK} are there")
        laid = values.new_zeros(kept.shape)
        laid[kept] = values[:count]
        return matrix(laid)[:rows, :columns].contiguous()
