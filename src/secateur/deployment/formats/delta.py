"""Numbers with the distance to the one before: the least work where almost everything is zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.deployment.formats.base import FORMATS, Format, Parts, padded, starts, stored

FARTHEST = 255  # what one byte says; zeros bridge wider gaps


@FORMATS.register("delta")
class Delta(Format):
    """Sixteen rows side by side; per step a lane has one number and, in a byte, how many columns it lies further on.

    Bytes and work both go with the numbers that are there. The inputs are gathered, which some processors do slowly.
    """

    name = "delta"
    parts = ("values", "deltas", "offsets")
    kernel = 3
    height = 16

    def _pack(self, weight: Tensor) -> Parts:
        whole = padded(weight, self.height, 1)
        row, column = stored(whole).nonzero(as_tuple=True)
        gap = column - torch.where(_starts_row(row), 0, column.roll(1))
        bridges = ((gap - 1) // FARTHEST).clamp(min=0)
        rank = _rank(row, bridges + 1)
        lengths = rank.new_zeros(len(whole)).scatter_reduce(0, row, rank + 1, "amax")
        offsets = starts(lengths.view(-1, self.height).amax(1))
        values = whole.new_zeros(int(offsets[-1]), self.height)
        deltas = values.new_zeros(values.shape, dtype=torch.uint8)
        step, lane = offsets[row // self.height] + rank, row % self.height
        values[step, lane] = whole[row, column]
        deltas[step, lane] = (gap - FARTHEST * bridges).to(torch.uint8)
        again = torch.repeat_interleave(bridges)
        back = torch.arange(len(again), device=again.device) - (starts(bridges)[:-1])[again]
        deltas[step[again] - 1 - back, lane[again]] = FARTHEST
        return values, deltas, offsets

    def unpack(self, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """The matrix that was packed."""
        values, deltas, offsets = parts
        dense = values.new_zeros(self.height * (len(offsets) - 1), columns)
        run = torch.cat([deltas.new_zeros(1, self.height), deltas]).long().cumsum(0)
        panel = torch.repeat_interleave(offsets.diff())
        column = run[1:] - run[offsets[:-1]][panel]
        step, lane = stored(values).nonzero(as_tuple=True)
        dense[panel[step] * self.height + lane, column[step, lane]] = values[step, lane]
        return dense[:rows].contiguous()


def _starts_row(row: Tensor) -> Tensor:
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    return first


def _rank(row: Tensor, taken: Tensor) -> Tensor:
    """The last of the places that each number takes within its row, counted from 0."""
    upto = taken.cumsum(0)
    before = torch.where(_starts_row(row), upto - taken, 0).cummax(0).values if len(row) else upto
    return upto - before - 1
