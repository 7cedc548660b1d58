"""What every layout does: take a matrix apart into plain tensors, and put it together again bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import InputError
from secateur.registry import Registry

Parts = tuple[Tensor, ...]
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Format(ABC):
    """One layout of a matrix (rows = outputs, columns = inputs).

    A number is stored where its bits are not all zero, so that -0.0 and NaN come back as they were.

    Class attributes:
        name: the word in the registry, in files and on the command line.
        parts: names of the tensors that `pack` returns, in the order in which the kernels take them.
        kernel: number of its native kernel; None = there is none.
        height: rows that its kernels work on together.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    kernel: ClassVar[int | None] = None
    height: ClassVar[int] = 1

    def why_not(self, weight: Tensor) -> str:
        """Why a matrix cannot have this layout, in words; "" where it can."""
        return ""

    def pack(self, weight: Tensor) -> Parts:
        """The tensors that hold the matrix.

        Args:
            weight: (rows, columns), of any real dtype whose elements have 1, 2, 4 or 8 bytes.

        Raises:
            InputError: no matrix, another dtype, or one that does not fit into this layout.
        """
        if weight.dim() != 2 or weight.is_complex() or weight.dtype == torch.bool:
            raise InputError(f"a matrix of real numbers is packed, not {tuple(weight.shape)} of {weight.dtype}")
        problem = self.why_not(weight)
        if problem:
            raise InputError(f"the matrix does not fit into the format {self.name!r}", why=problem)
        return self._pack(weight.detach())

    @abstractmethod
    def _pack(self, weight: Tensor) -> Parts: ...

    @abstractmethod
    def unpack(self, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
        """The matrix that was packed, bit for bit."""

    def check(self, parts: Sequence[Tensor], rows: int, columns: int) -> None:
        """Refuse tensors that `pack` cannot have written: kernels follow their offsets without looking.

        Raises:
            InputError: names what is wrong.

        Cost: the matrix is unpacked and packed once.
        """
        try:
            again = self.pack(self.unpack(parts, rows, columns))
            wrong = [n for n, a, b in zip(self.parts, parts, again, strict=True) if not same_bits(a, b)]
        except (RuntimeError, IndexError, ValueError, InputError) as error:
            raise InputError(
                f"a {rows} x {columns} matrix in the format {self.name!r} is damaged", why=str(error)
            ) from error
        if wrong:
            raise InputError(
                f"a {rows} x {columns} matrix in the format {self.name!r} is damaged",
                why=f"no matrix has such {' and '.join(wrong)}",
                hint="get the file again",
            )


FORMATS: Registry[type[Format]] = Registry("format", "formats")


def format_of(name: str) -> Format:
    """The layout of that name.

    Raises:
        RecipeError: unknown; the hint names the nearest known words.
    """
    return FORMATS.build(name)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes: NaN equals NaN, and 0.0 is not -0.0."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(words(one), words(other))


def words(tensor: Tensor) -> Tensor:
    """The bits as integers of the same size."""
    return tensor.contiguous().view(_WORDS[tensor.element_size()])


def stored(weight: Tensor) -> Tensor:
    """Where a number is kept: True wherever any bit is set."""
    return words(weight) != 0


def padded(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros below and to the right, up to multiples of `rows` and `columns`."""
    return functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))


def starts(counts: Tensor) -> Tensor:
    """Where each of several pieces starts in one row of all, and where the last one ends."""
    return functional.pad(counts.long().cumsum(0), (1, 0))


def to_bytes(bits: Tensor) -> Tensor:
    """Truth values, eight to a byte along the last dimension, the first in the lowest bit."""
    eight = bits.view(*bits.shape[:-1], -1, 8).to(torch.uint8)
    return (eight << _places(bits)).sum(-1, dtype=torch.uint8)


def from_bytes(packed: Tensor) -> Tensor:
    """What `to_bytes` packed."""
    return ((packed.unsqueeze(-1) >> _places(packed)) & 1).bool().flatten(-2)


def _places(beside: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=beside.device)
