"""A folder of states that a run keeps, so that it can go on after an interrupt, a kill or a crash.

Each state is one safetensors file whose header also holds the plain part of it. ``index.json`` names the file of each
state and its SHA-256. A state is written under a new name, then the index is exchanged in one step, then the old file
goes: at any moment the index names whole files. Nothing in the folder is code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.errors import FileRefusedError, RecipeError
from secateur.files.atomic import atomic_write
from secateur.files.disk import disk_errors
from secateur.files.leftovers import mark
from secateur.files.manifest import MANIFEST
from secateur.files.parse import parse_json
from secateur.files.safe import load_json, load_metadata, load_tensors, save_tensors
from secateur.files.seeds import canonical_json, stable_hash
from secateur.files.states import TREE, decode, encode

INDEX, LOCK, OWN = "index.json", "lock", "own"
PAGE = "progress.html"
"""Curves of a run that goes on, for people; no state."""
EVERY = 60.0
SHARE = 20  # a large state on a slow disk is written less often
_SCHEMA = 1
_FILE = re.compile(r"state-\d{1,12}\.safetensors")


class Checkpoint:
    """The states of one run, by name. Only one process at a time has a folder.

    Args:
        folder: made where it is missing.
        about: what the run is, as plain data; a folder of another run is refused.
        every: seconds between two states that are not those of the end of a stage.
        clock: source of time in seconds.

    Attributes:
        began: whether the run begins here, and is not one that goes on.

    Raises:
        FileRefusedError: the folder is no checkpoint, is damaged, belongs to another run, or another process has it.
        RecipeError: `every` is negative.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        about: Mapping[str, object] | None = None,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not every >= 0:
            raise RecipeError(f"a checkpoint every {every!r} seconds", hint="give 0 or more")
        self.folder, self.every, self._clock = Path(folder), every, clock
        self._entries: dict[str, dict[str, str]] = {}
        self._number, self._last, self._spent = 0, clock(), 0.0
        self._fd: int | None = None
        self.about: Mapping[str, Any] = {}
        self.began = not (self.folder / INDEX).exists()
        self._take(about is not None)
        try:
            self._open(about)
        except BaseException:
            if self.began and not self._entries and not (self.folder / INDEX).exists():
                self._leave()
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the states that are there."""
        return tuple(sorted(self._entries))

    def room(self, name: str) -> Path:
        """A folder inside, made by who needs it, for files that a stage keeps by itself; it goes with the states."""
        return self.folder / OWN / name

    def due(self) -> bool:
        """Whether it is time for another state; large ones are written less often, to take little of the time."""
        return self._clock() - self._last >= max(self.every, SHARE * self._spent if self.every else 0.0)

    def put(self, name: str, state: object) -> None:
        """Keep a state under a name, in the place of the one before; on the disk as a whole when this returns."""
        self.exchange({name: state})

    def exchange(self, put: Mapping[str, object], drop: Iterable[str] = ()) -> None:
        """Keep several states and forget others, in one step: whoever comes later finds all of it done, or nothing."""
        began, before = self._clock(), self._entries
        entries = dict(before)
        for name, state in put.items():
            tree, tensors = encode(state)
            self._number += 1
            file = f"state-{self._number}.safetensors"
            digest = save_tensors(self.folder / file, tensors, {TREE: canonical_json(tree)})
            entries[name] = {"file": file, "sha256": digest}
        for name in drop:
            entries.pop(name, None)
        if entries == before:
            return
        self._entries = entries
        self._write_index()
        for name, entry in before.items():
            if entries.get(name) != entry:
                self._unlink(entry["file"])
        if put:
            self._last = self._clock()
            self._spent = self._last - began

    def get(self, name: str) -> Any:
        """The state of that name, or None; the file is checked against its hash.

        Raises:
            FileRefusedError: the file is missing, damaged or exchanged.
        """
        entry = self._entries.get(name)
        if entry is None:
            return None
        tensors = load_tensors(entry["file"], sha256=entry["sha256"], within=self.folder)
        tree = load_metadata(self.folder / entry["file"])[TREE]
        return decode(parse_json(tree.encode(), origin=str(self.folder / entry["file"])), tensors)

    def drop(self, name: str) -> None:
        """Forget a state."""
        self.exchange({}, [name])

    def close(self) -> None:
        """Let other processes have the folder; the states stay."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def remove(self) -> None:
        """Delete the folder with all states: the run has ended well, or there is nothing to go on with."""
        # First: without an index nobody would know whose it is.
        shutil.rmtree(self.folder / OWN, ignore_errors=True)
        for path in self.folder.iterdir():
            if _FILE.fullmatch(path.name) or path.name in (INDEX, PAGE, f".{PAGE}"):
                path.unlink()
        self._leave()
        self.close()

    # -- the folder -------------------------------------------------------------------------------------------

    def _take(self, new: bool) -> None:
        if not new and not (self.folder / INDEX).exists():
            ended = (self.folder / MANIFEST).exists()
            raise FileRefusedError(
                f"there is nothing to resume in {self.folder}",
                why=f"it holds no {INDEX}" + (", but the manifest of a result: the run has ended" if ended else ""),
                hint="name the output folder of a run that was interrupted, or the folder given as checkpoint",
            )
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fd = fd = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        if not mark(fd):
            self.close()
            raise FileRefusedError(
                f"{self.folder} is in use", why="another process works on this run", hint="wait until it has ended"
            )

    def _leave(self) -> None:
        (self.folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put a file of theirs there: it stays
            self.folder.rmdir()

    def _open(self, about: Mapping[str, object] | None) -> None:
        if (self.folder / INDEX).exists():
            self._read(about)
        else:
            strange = sorted(path.name for path in self.folder.iterdir() if not _ours(path.name))
            if strange:
                raise FileRefusedError(
                    f"{self.folder} cannot hold a checkpoint: it holds {strange[0][:80]!a}",
                    hint="name a new folder, or an empty one",
                )
            self.about = dict(about or {})
            self._write_index()
        # What a kill left between a state and the index that names it.
        named = {entry["file"] for entry in self._entries.values()}
        for path in self.folder.iterdir():
            if _FILE.fullmatch(path.name) and path.name not in named:
                path.unlink()

    def _read(self, about: Mapping[str, object] | None) -> None:
        path = self.folder / INDEX
        found = load_json(path)
        check = found.pop("check", None) if isinstance(found, dict) else None
        if check is None or stable_hash(found) != check or not _well_formed(found):
            raise FileRefusedError(f"{path} is damaged, or no checkpoint of secateur", hint="remove it and start anew")
        self.about, self._entries, self._number = found["about"], found["entries"], found["number"]
        if about is not None and stable_hash(about) != stable_hash(self.about):
            raise FileRefusedError(
                f"{self.folder} holds another run",
                why=_difference(self.about, about),
                hint="ask for the same run to go on with it, or name another folder",
            )

    def _write_index(self) -> None:
        data = {"schema": _SCHEMA, "about": self.about, "entries": self._entries, "number": self._number}
        # Through JSON first: tuples of `about` come back as lists, and the check is over what is read.
        data = json.loads(canonical_json(data))
        atomic_write(self.folder / INDEX, canonical_json({**data, "check": stable_hash(data)}))

    def _unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            (self.folder / name).unlink()


def _well_formed(index: Mapping[str, object]) -> bool:
    entries = index.get("entries")
    return (
        index.get("schema") == _SCHEMA
        and isinstance(index.get("about"), dict)
        and isinstance(index.get("number"), int)
        and isinstance(entries, dict)
        and all(isinstance(entry, dict) and set(entry) == {"file", "sha256"} for entry in entries.values())
        and all(_FILE.fullmatch(entry["file"]) for entry in entries.values())
    )


def _ours(name: str) -> bool:
    return name == LOCK or bool(_FILE.fullmatch(name)) or name.startswith(f".{INDEX}.") or name.startswith(".state-")


def _difference(there: Mapping[str, object], asked: Mapping[str, object]) -> str:
    asked = json.loads(canonical_json(dict(asked)))
    keys = [key for key in sorted({*there, *asked}) if there.get(key) != asked.get(key)]
    return f"{', '.join(keys)} differ" if keys else ""
