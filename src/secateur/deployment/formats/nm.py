"""At most n numbers in every m columns of a row: their places are small, and every row is equally long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.deployment.formats.base import FORMATS, Format, Parts, padded, stored

GROUPS = (4, 8, 16)
GAIN = 2  # at least every second number must be zero: the places cost bytes too


@FORMATS.register("nm")
class NMFormat(Format):
    """Groups of m = 4, 8 or 16 columns with at most m / 2 numbers in each, as masks of the granularity n:m leave them.

    A number's place in its group takes half a byte. The smallest n / m that fits is found in the matrix. There is no
    kernel of its own: ``slide16`` runs such a matrix, with almost nothing to fill, and this one is smaller on the disk.
    """

    name = "nm"
    parts = ("values", "places")

    def why_not(self, weight: Tensor) -> str:
        """Why the matrix is no n:m pattern."""
        n, m = _pattern(weight)
        return "" if GAIN * n <= m else f"some {m} columns of a row hold {n} numbers, more than half of them"

    def _pack(self, weight: Tensor) -> Parts:
        n, m = _pattern(weight)
        groups = padded(weight, 1, m).view(len(weight), -1, m)
        # A stable sort of "is not there" brings what is there to the front, in the order of the columns.
        place = (~stored(groups)).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n]
        place = torch.where(torch.arange(n, device=place.device) < stored(groups).sum(-1, keepdim=True), place, 0)
        flat = torch.nn.functional.pad(place.flatten(1).to(torch.uint8), (0, place[0].numel() % 2 if len(place) else 0))
        return groups.gather(-1, place).contiguous(), flat[:, ::2] | flat[:, 1::2] << 4

    def unpack(self, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """The matrix that was packed."""
        values, packed = parts
        count, n = values.shape[1:]
        place = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, : count * n].view(values.shape).long()
        m = next(m for m in GROUPS if -(-columns // m) == count)
        groups = values.new_zeros(rows, count, m)
        row, group, number = stored(values).nonzero(as_tuple=True)
        groups[row, group, place[row, group, number]] = values[row, group, number]
        return groups.flatten(1)[:, :columns].contiguous()


def _pattern(weight: Tensor) -> tuple[int, int]:
    """The n and m that leave the fewest numbers; of equals the smaller m."""
    found = []
    for m in GROUPS:
        groups = stored(padded(weight, 1, m)).view(len(weight), -1, m)
        found.append((max(1, int(groups.sum(-1).amax()) if groups.numel() else 1), m))
    # Groups that are wider than the matrix would be confused with narrower ones when they are counted.
    usable = [(n, m) for n, m in found if m == GROUPS[0] or -(-weight.shape[1] // m) < -(-weight.shape[1] // (m // 2))]
    return min(usable, key=lambda each: (each[0] / each[1], each[1]))
