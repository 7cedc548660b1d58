"""Sixteen rows side by side, each working off its own numbers of a window: work that shrinks with the zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.deployment.formats.base import FORMATS, Format, Parts, padded, starts, stored
from secateur.deployment.formats.dense import matrix, panels

WINDOW = 32  # columns: as many as two registers of inputs hold
_BITS = torch.arange(WINDOW - 1, -1, -1)  # the first column has the highest bit: leading zeros are then its number


@FORMATS.register("lanes")
class Lanes(Format):
    """A row is a lane of a vector. In every window of 32 columns the lanes take one of their numbers per step.

    There are as many steps as the fullest lane needs; the others are filled with zeros, which are read and multiplied.
    Equally full rows (n:m patterns) leave nothing to fill.
    """

    name = "lanes"
    parts = ("values", "masks", "steps", "offsets")
    kernel = 2
    height = 16

    def _pack(self, weight: Tensor) -> Parts:
        laid = panels(padded(weight, self.height, WINDOW), self.height, WINDOW)
        kept = stored(laid)
        steps = kept.sum(-1).amax(-1)
        values = laid.new_zeros(int(steps.sum()), self.height)
        step, row = _places(kept, steps)
        values[step, row] = laid[kept]
        bits = (kept.long() << _BITS).sum(-1)
        offsets = starts(steps.sum(1))
        return values, (bits - ((bits >> 31) << 32)).int(), steps.to(torch.uint8), offsets

    def unpack(self, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """The matrix that was packed."""
        values, masks, steps, _ = parts
        kept = ((masks.long().unsqueeze(-1) >> _BITS) & 1).bool()
        laid = values.new_zeros(kept.shape)
        step, row = _places(kept, steps)
        laid[kept] = values[step, row]
        return matrix(laid)[:rows, :columns].contiguous()


def _places(kept: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """(step, lane) of every number that is kept, in the order of the mask."""
    first = starts(steps.flatten())[:-1].view(*steps.shape, 1, 1)
    rank = kept.cumsum(-1) - 1
    lane = torch.arange(kept.shape[2]).view(-1, 1)
    return (first + rank)[kept], lane.expand(kept.shape)[kept]
