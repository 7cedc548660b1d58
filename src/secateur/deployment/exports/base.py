"""What every way out does: write a model for another runtime, check what was written, and say what it can use of it."""

from __future__ import annotations

import copy
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import nn

from secateur.deployment.packed import densify, packed_layers
from secateur.errors import FileRefusedError, InputError
from secateur.registry import Registry
from secateur.types import Example


@dataclass(frozen=True)
class Exported:
    """What was written, and what is known about it.

    Args:
        format: name of the exporter.
        path: the file or folder.
        size_bytes: of everything that belongs to it.
        checked: how it was checked, in words.
        facts: what else is worth knowing: differences, inputs, dtypes.
    """

    format: str
    path: Path
    size_bytes: int
    checked: str
    facts: Mapping[str, object] = field(default_factory=dict)


class Exporter(ABC):
    """One way out. Options are arguments of the constructor; `EXPORTERS.build(name, options)` makes one.

    Class attributes:
        name: the word in the registry and on the command line.
        writes: what appears, "file" or "folder".
        needs_example: whether the model has to be run.
        packed: whether packed layers may stay as they are; else they are made dense in a copy.
        uses: what the target runtime makes of a pruned model, in a sentence.
        loses: what it cannot use, in a sentence.
    """

    name: ClassVar[str]
    writes: ClassVar[str] = "file"
    needs_example: ClassVar[bool] = False
    packed: ClassVar[bool] = False
    uses: ClassVar[str]
    loses: ClassVar[str]

    @abstractmethod
    def write(self, model: nn.Module, path: Path, example: Example, *, force: bool) -> Exported:
        """Write the model; `path` is free, or may be replaced.

        Args:
            model: left as it is.
            path: where it goes.
            example: what `secateur.model.call.call` takes, or None.
            force: replace what is there.
        """


EXPORTERS: Registry[type[Exporter]] = Registry("export format", "export formats")


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "safetensors",
    example: Example = None,
    force: bool = False,
    **options: object,
) -> Exported:
    """Take a model to another runtime.

    Args:
        model: pruned or not, on the CPU; left as it is. Packed layers are made dense in a copy where the target knows
            none.
        path: the file or folder to write; it appears whole, after it was checked, or not at all.
        format: name of an exporter (`secateur.deployment.EXPORTERS.names()`).
        example: what one forward takes; needed by those that run the model.
        force: replace what is there.
        **options: of the exporter.

    Returns:
        what was written and how it was checked.

    Raises:
        RecipeError: an unknown format or option.
        InputError: the exporter needs an example.
        UnsupportedError: the target cannot express the model; the message says why.
        FileRefusedError: the path is taken.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(nn.Linear(2, 3), f"{folder}/m.safetensors").size_bytes > 36
        True
    """
    exporter, target = EXPORTERS.build(format, options), Path(path)
    if exporter.needs_example and example is None:
        raise InputError(f"{format} needs an example input", hint="give example=, what one forward pass takes")
    if target.exists() and not force:
        raise FileRefusedError(f"{target} exists already", hint="choose another name, or force=True")
    if target.exists() and target.is_dir() != (exporter.writes == "folder"):
        raise FileRefusedError(f"{target} is not replaced", why=f"{format} writes a {exporter.writes}")
    if not exporter.packed and packed_layers(model):
        model = densify(copy.deepcopy(model))
    return exporter.write(model, target, example, force=force)


def size_of_files(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())


def publish(draft: Path, path: Path) -> int:
    """Move a checked draft to its name, after what lies beside it: a file that is there is complete.

    Args:
        draft: in a folder of its own, on the same disk.
        path: where it goes; what is there is replaced.

    Returns:
        bytes of all files.
    """
    files = sorted(draft.parent.iterdir(), key=lambda file: file == draft)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        if file.is_dir():
            shutil.rmtree(file)  # what an exporter kept there while it worked
            continue
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.replace(path.parent / file.name)
    return size
