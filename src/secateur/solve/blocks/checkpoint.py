"""Finished blocks on disk, so that a run that was killed goes on behind the last of them, with the same result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import FileRefusedError
from secateur.files import atomic_write, canonical_json, load_json, load_tensors, save_tensors, stable_hash
from secateur.solve.blocks.hidden import HiddenStates
from secateur.solve.blocks.layer import LayerRecord
from secateur.solve.blocks.tune import SubBlockRecord

STATE = "state.json"


class BlockCheckpoint:
    """The finished blocks of one stack.

    Args:
        folder: where they lie.
        key: hash of all that decides about the result.
        done: blocks that are finished.
        files: file name -> its SHA-256.
    """

    def __init__(self, folder: Path, key: str, done: int, files: dict[str, str]) -> None:
        self.folder, self.key, self.done, self.files = folder, key, done, files

    @classmethod
    def open(cls, folder: Path | None, key: object, stack: int) -> BlockCheckpoint | None:
        """The state of a folder, made if it is not there; None where none is wanted.

        Raises:
            FileRefusedError: the folder belongs to another run, or is damaged.
        """
        if folder is None:
            return None
        own, hashed = Path(folder) / str(stack), stable_hash([str(key)])
        own.mkdir(parents=True, exist_ok=True)
        if not (own / STATE).exists():
            return cls(own, hashed, 0, {})
        said = load_json(own / STATE)
        if not isinstance(said, dict) or said.get("key") != hashed:
            raise FileRefusedError(
                f"{own} holds the finished blocks of another run.",
                why="model, data or settings differ",
                hint="use another checkpoint folder, or remove this one",
            )
        return cls(own, hashed, int(said["done"]), dict(said["files"]))

    def save(
        self,
        place: int,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        records: Sequence[LayerRecord],
        tuned: Sequence[SubBlockRecord],
        streams: Mapping[str, HiddenStates | None],
    ) -> None:
        """Write one more block, and what goes into the next one; the state last, so that a kill leaves the old one."""
        tensors = {f"weight.{name}": value for name, value in weights.items()}
        tensors |= {f"mask.{name}": value for name, value in masks.items()}
        old = [name for name in self.files if name.startswith("hidden-")]
        told = {
            "records": canonical_json([asdict(one) for one in records]),
            "tuned": canonical_json([asdict(one) for one in tuned]),
        }
        self._write(f"block-{place}.safetensors", tensors, told)
        for name, store in streams.items():
            if store is not None:
                self._write(f"hidden-{name}-{place}.safetensors", store.items())
        kept = {name: digest for name, digest in self.files.items() if name not in old}
        self.done, self.files = place + 1, kept
        atomic_write(self.folder / STATE, canonical_json({"key": self.key, "done": self.done, "files": kept}))
        for name in old:
            (self.folder / name).unlink(missing_ok=True)

    def load(self, place: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[LayerRecord], list[SubBlockRecord]]:
        """Weights, masks and records of a finished block, and of its sub-blocks."""
        from secateur.files import load_metadata

        name = f"block-{place}.safetensors"
        found = self._read(name)
        weights = {key.removeprefix("weight."): v for key, v in found.items() if key.startswith("weight.")}
        masks = {key.removeprefix("mask."): v for key, v in found.items() if key.startswith("mask.")}
        told = load_metadata(self.folder / name)
        records = [LayerRecord(**one) for one in _records(told.get("records", "[]"))]
        return weights, masks, records, [SubBlockRecord(**one) for one in _records(told.get("tuned", "[]"))]

    def hidden(self, stream: str) -> dict[str, Tensor]:
        """What goes into the next block."""
        return self._read(f"hidden-{stream}-{self.done - 1}.safetensors")

    def _write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self.files[name] = save_tensors(self.folder / name, tensors, metadata)

    def _read(self, name: str) -> dict[str, Tensor]:
        if name not in self.files:
            raise FileRefusedError(f"{self.folder} is damaged: it has no {name}", hint="remove the folder")
        return load_tensors(name, within=self.folder, sha256=self.files[name])


def _records(text: str) -> list[Any]:
    from secateur.files.parse import parse_json

    found = parse_json(text.encode(), origin="the records of a checkpoint", max_depth=4)
    return found if isinstance(found, list) else []
