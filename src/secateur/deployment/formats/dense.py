"""Every number, panel by panel: what the other formats have to beat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.deployment.formats.base import FORMATS, Format, Parts, padded

STEP = 16  # columns that a kernel takes at once


@FORMATS.register("dense")
class Dense(Format):
    """No zeros are left out. Eight rows lie together, 16 columns of each in turn, so a kernel reads one stream."""

    name = "dense"
    parts = ("values",)
    kernel = 0
    height = 8

    def _pack(self, weight: Tensor) -> Parts:
        return (panels(padded(weight, self.height, STEP), self.height).contiguous(),)

    def unpack(self, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """The matrix that was packed."""
        return matrix(parts[0])[:rows, :columns].contiguous()


def panels(weight: Tensor, height: int, step: int = STEP) -> Tensor:
    """(panel, step, row, column) of a matrix whose sizes are multiples."""
    rows, columns = weight.shape
    return weight.reshape(rows // height, height, columns // step, step).transpose(1, 2)


def matrix(panelled: Tensor) -> Tensor:
    """The matrix of its panels."""
    return panelled.transpose(1, 2).flatten(2, 3).flatten(0, 1)
