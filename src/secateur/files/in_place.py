"""Tensors where they lie on disk: read when they are touched, written in place, and out of memory when told."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from secateur.errors import FileRefusedError
from secateur.files.header import ITEM_SIZE, Entry, header_length, parse_header
from secateur.files.safe import dtypes
from secateur.files.sniff import open_regular


def trim() -> None:
    """Let the operating system have memory that was freed and that the C library keeps for later."""
    # Every forward pass of a solver has a thread of its own, and glibc a heap for each, which it never shrinks.
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if release is not None:
        release(0)


class MappedBytes:
    """A file as memory; what is written there lands in the file.

    Args:
        path: an ordinary file.
        size: it is made this long where it is not there yet; None: as it is.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        if size is not None:
            with path.open("wb") as stream:
                stream.truncate(max(size, 1))
        with path.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_WRITE)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], begin: int = 0) -> Tensor:
        """A tensor whose bytes begin at a place."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.bytes[begin : begin + size].view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Let the operating system have the memory; what is touched again is read again."""
        # Windows has no such call, and takes pages back by itself.
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Write what has changed to the disk."""
        self._map.flush()


class MappedTensors:
    """The tensors of a safetensors file, in place.

    Args:
        path: the file; its header is checked as `secateur.files.load_tensors` checks it.

    Raises:
        FileRefusedError: a damaged or lying file, or tensors that cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        with open_regular(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            length = header_length(stream.read(8), size=size, origin=str(path))
            header = parse_header(stream.read(length), payload=size - 8 - length, origin=str(path))
        self._bytes = MappedBytes(path)
        self.tensors = {entry.name: self._tensor(entry, 8 + length, path) for entry in header.entries}

    @classmethod
    def of(cls, paths: Sequence[Path]) -> list[Self]:
        """Those of several files."""
        return [cls(path) for path in paths]

    def release(self) -> None:
        """Let the operating system have the memory."""
        self._bytes.release()

    def flush(self) -> None:
        """Write what has changed to the disk."""
        self._bytes.flush()

    def _tensor(self, entry: Entry, start: int, path: Path) -> Tensor:
        begin = start + entry.begin
        if begin % ITEM_SIZE[entry.dtype]:
            raise FileRefusedError(
                f"{path} cannot be used in place: {entry.name[:80]!a} begins at an odd byte",
                hint="write it again, for example with save_pretrained",
            )
        return self._bytes.tensor(dtypes()[entry.dtype], entry.shape, begin)
