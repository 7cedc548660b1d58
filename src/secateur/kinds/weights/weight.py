"""One weight as granularities see it, whichever way round its parameter stores it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.types import Group, Span


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that can be pruned.

    Args:
        name: qualified name of the parameter, the first one where it is tied.
        shape: its shape.
        transposed: False for [out, in, ...], True for [in, out, ...] (ConvTranspose, Conv1D of transformers).
        matrix: whether it is one matrix [out, in * kernel]; False for stacks of matrices (fused experts) and bilinear
            forms, of which only single weights and patterns along the input can go.
        dims: its output and input dimension; None where nobody knows them.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    matrix: bool = True
    dims: tuple[int, int] | None = (0, 1)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape as [out, in, ...]."""
        return (self.shape[1], self.shape[0], *self.shape[2:]) if self.transposed else self.shape

    @property
    def width(self) -> int | None:
        """Size of the input dimension; None where nobody knows which it is."""
        return self.matrix_shape[1] if self.matrix else None if self.dims is None else self.shape[self.dims[1]]

    def oriented(self, index: Tensor) -> Tensor:
        """Turn an index over [out, in, ...] into one over the parameter's own layout (a view)."""
        return index.transpose(0, 1) if self.transposed else index

    def group(self, granularity: str, shape: tuple[int, ...], index: Tensor | None, **attributes: object) -> Group:
        """The group of this weight; `index` is over [out, in, ...]."""
        own = None if index is None else self.oriented(index)
        out, into = (int(self.transposed), int(not self.transposed)) if self.matrix else self.dims or (0, 1)
        axes = {"out_dim": out, "in_dim": into}
        return Group(self.name, granularity, shape, (Span(self.name, own, "self"),), attributes={**axes, **attributes})
