"""Hidden states between two blocks: in memory as far as there is room, the rest on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from secateur.files.in_place import MappedBytes


class HiddenStates:
    """A list of tensors, one per batch.

    Args:
        room: bytes that lie in memory at most; None: all of them.
    """

    def __init__(self, room: int | None) -> None:
        self._room = room
        self._kept: list[Tensor] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._on_disk: dict[int, MappedBytes] = {}
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: int) -> Tensor:
        if number not in self._on_disk:
            return self._kept[number]
        # A copy, so that the mapped one can go out of memory again. What lies on disk is memory of the CPU.
        found = self._kept[number].to(self._device, copy=True)
        self._on_disk[number].release()
        return found

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
            self._on_disk.pop(number, None)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="secateur-hidden-")
        path = Path(self._folder.name) / f"{number}.bin"
        room = self._on_disk.get(number)
        if room is None or room.bytes.numel() != max(_bytes(value), 1):
            room = MappedBytes(path, _bytes(value))
        mapped = room.tensor(value.dtype, value.shape)
        mapped.copy_(value)
        room.release()
        self._kept[number], self._on_disk[number] = mapped, room

    def close(self) -> None:
        """Forget all batches, and what lies on disk."""
        self._kept, self._on_disk = [], {}
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
