"""Hidden states between two blocks: in memory as far as there is room, the rest on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """A list of tensors, one per batch.

    Args:
        room: bytes that lie in memory at most; None: all of them.
    """

    def __init__(self, room: int | None) -> None:
        self._room = room
        self._kept: list[Tensor] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._on_disk: set[int] = set()
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: int) -> Tensor:
        # What lies on disk is memory of the CPU.
        return self._kept[number].to(self._device)

    def append(self, value: Tensor) -> None:
        """One more batch."""
        self._kept.append(value)
        self.put(len(self._kept) - 1, value)

    def put(self, number: int, value: Tensor) -> None:
        """Replace a batch."""
        self._device = value.device
        used = sum(_bytes(kept) for i, kept in enumerate(self._kept[:number]) if i not in self._on_disk)
        if self._room is None or used + _bytes(value) <= self._room:
            self._kept[number] = value
            self._on_disk.discard(number)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="secateur-hidden-")
        path = Path(self._folder.name) / f"{number}.bin"
        # Pages of a mapped file go out of memory by themselves when there is none left.
        mapped = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        mapped.copy_(value)
        self._kept[number] = mapped
        self._on_disk.add(number)

    def close(self) -> None:
        """Forget all batches, and what lies on disk."""
        self._kept = []
        if self._folder is not None:
            self._folder.cleanup()

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Replace all batches, named by their numbers."""
        for name, value in values.items():
            self.put(int(name), value.to(self._device))

    def items(self) -> dict[str, Tensor]:
        """All batches, named by their numbers."""
        return {str(i): value for i, value in enumerate(self._kept)}


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
