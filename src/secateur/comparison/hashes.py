"""Hashes of what is compared: models, batches in their order, and the addresses of results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from secateur.files.seeds import canonical_json, stable_hash
from secateur.model.hashing import hash_model, raw
from secateur.types import Batch, Data, Json

__all__ = ["Watched", "hash_batch", "hash_batches", "hash_model", "key_of"]


def hash_batch(batch: Batch) -> str:
    """SHA-256 over the tensors of a batch, in order."""
    digest = hashlib.sha256()
    for tensor in _tensors(batch):
        digest.update(f"{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def hash_batches(batches: Iterable[Batch]) -> str:
    """One hash of a sequence of batches; order counts."""
    return stable_hash([hash_batch(batch) for batch in batches])


class Watched:
    """Data that keeps a running hash of every batch it hands out: the proof that two recoveries saw the same.

    Args:
        data: batches; `set_epoch` is passed on where it is there.
    """

    def __init__(self, data: Data) -> None:
        self._data, self._digest = data, hashlib.sha256()
        self.batches = 0

    @property
    def epoch(self) -> int:
        """The epoch that is set."""
        return int(getattr(self._data, "epoch", 0))

    @property
    def seen(self) -> str:
        """Hash of all batches so far."""
        return self._digest.hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        setter = getattr(self._data, "set_epoch", None)
        if callable(setter):
            setter(epoch)

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            # Before it is handed out: a loop that writes into its batch must not change what is said to be seen.
            self.batches += 1
            self._digest.update(hash_batch(batch).encode())
            yield batch


def key_of(**parts: Json) -> str:
    """Content address of plain parts: the file name of a result."""
    # 32 hex digits are 128 bits: no two results of any comparison meet by chance, and names stay readable.
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):  # a collate function may fill its mapping in any order
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
