"""Sixteen rows side by side, reading inputs through a window that slides along: work goes with the non-zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from secateur.deployment.formats.base import FORMATS, Format, Parts, padded, starts, stored

GROUP = 8  # steps that share one vector of places
_END = 1 << 40  # a column behind every matrix


class _Slide(Format):
    """A row is a lane of a vector, and in every step a lane may work off its next number.

    The window starts at the leftmost column that is still to do, and every lane whose next number lies in it takes
    part; the others wait, with a zero to fill. A lane need not wait until it is further ahead than the window is wide,
    so little is filled: 6 to 10 % at half zeros, 30 to 40 % at nine tenths. Inputs come by a permutation in registers,
    never by a gather. Steps are stored eight at a time, interleaved so that shifts take them apart.
    """

    parts = ("values", "places", "windows", "offsets")
    height = 16
    window: ClassVar[int]
    bits: ClassVar[int]  # of a place in the window

    def _pack(self, weight: Tensor) -> Parts:
        whole = padded(weight, self.height, 1)
        column, base, lengths = self._schedule(stored(whole))
        groups = -(-lengths // GROUP)
        offsets = starts(groups)
        there = column >= 0
        panel, step, lane = there.nonzero(as_tuple=True)
        flat = offsets[panel] * GROUP + step
        total = int(offsets[-1]) * GROUP
        values = whole.new_zeros(total, self.height)
        places = whole.new_zeros(total, self.height, dtype=torch.uint8)
        windows = whole.new_zeros(total, dtype=torch.int32)
        values[flat, lane] = whole[panel * self.height + lane, column[there]]
        places[flat, lane] = (column[there] - base[panel, step]).to(torch.uint8)
        windows[flat] = base[panel, step].int()
        return _interleave(values, _per_word(values)), self._join(places), windows, offsets

    def unpack(self, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """The matrix that was packed."""
        values, places, windows, offsets = parts
        values, places = _separate(values, _per_word(values)), self._split(places)
        dense = values.new_zeros(self.height * (len(offsets) - 1), columns)
        panel = torch.repeat_interleave(offsets.diff() * GROUP)
        step, lane = stored(values).nonzero(as_tuple=True)
        column = windows.long()[step] + places.long()[step, lane]
        dense[panel[step] * self.height + lane, column] = values[step, lane]
        return dense[:rows].contiguous()

    def _schedule(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What every lane takes in every step, the windows, and the steps of each panel; all panels at once.

        Returns:
            columns (panel, step, lane), -1 where a lane waits; first columns of the windows (panel, step); steps.
        """
        rows, columns = kept.shape
        most = int(kept.sum(1).amax()) if kept.numel() else 0
        row, column = kept.nonzero(as_tuple=True)
        rank = (kept.cumsum(1) - 1)[row, column]
        todo = column.new_full((rows, most + 1), _END)
        todo[row, rank] = column
        todo = todo.view(-1, self.height, most + 1)
        last = max(0, -(-columns // 32) * 32 - self.window)  # a window further right would end behind the inputs
        done = todo.new_zeros(todo.shape[:2])
        taken, first = [], []
        upcoming = todo[..., 0]
        while bool((upcoming < _END).any()):
            base = upcoming.amin(1, keepdim=True).clamp(max=last)
            now = upcoming < base + self.window
            taken.append(torch.where(now, upcoming, -1))
            first.append(base.squeeze(1))
            done += now
            upcoming = todo.gather(2, done.unsqueeze(2)).squeeze(2)
        if not taken:
            nothing = todo.new_full((len(todo), 0, self.height), -1)
            return nothing, nothing[..., 0], todo.new_zeros(len(todo))
        columns_taken = torch.stack(taken, 1)
        return columns_taken, torch.stack(first, 1), (columns_taken >= 0).any(2).sum(1)

    def _join(self, places: Tensor) -> Tensor:
        """Places as bytes: one each, or two to a byte."""
        laid = _interleave(places, 32 // self.bits)
        return laid if self.bits == 8 else laid[..., ::2] | laid[..., 1::2] << 4

    def _split(self, joined: Tensor) -> Tensor:
        if self.bits == 4:
            joined = torch.stack([joined & 15, joined >> 4], -1).flatten(-2)
        return _separate(joined, 32 // self.bits)


def _per_word(values: Tensor) -> int:
    return max(1, 4 // values.element_size())


def _interleave(steps: Tensor, width: int) -> Tensor:
    """(group, word, lane, step in the word) of (step, lane)."""
    return steps.view(-1, GROUP // width, width, steps.shape[1]).transpose(2, 3).contiguous()


def _separate(words: Tensor, width: int) -> Tensor:
    return words.view(-1, GROUP // width, words.shape[2], width).transpose(2, 3).flatten(0, 2)


@FORMATS.register("slide16")
class Slide16(_Slide):
    """The window of 16 columns: half a byte per place. Few bytes and little work from 50 to 85 % of zeros."""

    name, kernel, window, bits = "slide16", 2, 16, 4


@FORMATS.register("slide32")
class Slide32(_Slide):
    """The window of 32 columns: a byte per place, and fewer lanes that wait. For 85 % of zeros and more."""

    name, kernel, window, bits = "slide32", 5, 32, 8
