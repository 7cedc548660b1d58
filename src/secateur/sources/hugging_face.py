"""A Hugging Face folder before transformers sees it: plain files, no wish to run code, counts that its weights bear."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import FileRefusedError, InputError
from secateur.files.paths import check_name
from secateur.files.safe import load_json
from secateur.sources.sparse_bitmask import header_of

MAX_CONFIG = 1 << 22
MAX_FILES = 10_000
# Keys by which configs name code that somebody would have to run; whatever their value, empty ones excepted.
CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "_target_", "_partial_"})
# Keys that choose how attention runs; a value with a slash names a kernel on a hub, which is code.
KERNEL_KEYS = re.compile(r"_?(attn|experts?|kernels?)\w*(implementation|kernel|config)\w*|use_kernels")
CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
COUNT = re.compile(r"(^|_)(n|num|number)_?(\w*_)?(layers?|blocks?|stages?)$|^n_layers?$|^depths?$")


def check_folder(folder: Path) -> None:
    """Refuse a local folder that could hang or mislead a reader, or whose files ask for code.

    Args:
        folder: a model in the layout of Hugging Face.

    Raises:
        FileRefusedError: a pipe, device or socket among the files, a config that asks for code, an index that leaves
            the folder, a layer count that its weights cannot hold, or JSON that is not plain.

    Cost: one stat per file; configs and headers of weights are read.
    """
    for number, path in enumerate(folder.iterdir()):
        if number >= MAX_FILES:
            raise FileRefusedError(f"{folder} is refused: it holds more than {MAX_FILES} files")
        kind = _kind(path)
        if kind:
            raise FileRefusedError(f"{path} is refused: it is {kind}", why="a model folder holds ordinary files only")
        if path.suffix == ".json" and path.is_file() and path.name.endswith(("config.json", "index.json")):
            found = load_json(path, max_bytes=1 << 26 if "index" in path.name else MAX_CONFIG)
            if "index" in path.name:
                _check_index(found, path)
            else:
                check_config(found, str(path))
    config = folder / "config.json"
    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    if config.is_file() and weights:
        _check_counts(load_json(config, max_bytes=MAX_CONFIG), sum(map(_tensors_in, weights)), str(config))


def check_config(config: object, origin: str) -> None:
    """Refuse a config that asks for code.

    Args:
        config: parsed JSON.
        origin: where it comes from, for messages.

    Raises:
        FileRefusedError: names the key, its place, and what to do.
    """
    if not isinstance(config, Mapping):
        raise FileRefusedError(f"{origin} is refused: it is not a JSON object")
    for place, key, value in _items(config):
        if key in CODE_KEYS and value not in (None, False, {}, [], ""):
            raise _asks(origin, place, "names code that would have to be run")
        if KERNEL_KEYS.fullmatch(key) and any("/" in text for text in _texts(value)):
            raise _asks(origin, place, "names a kernel on a hub, which is code")
        if (key == "architectures" or key.endswith("_class")) and not all(map(CLASS.fullmatch, _texts(value))):
            raise _asks(origin, place, "is not the plain name of a class")


def _asks(origin: str, place: str, why: str) -> FileRefusedError:
    return FileRefusedError(
        f"{origin} is refused: its {place!r} {why}",
        why="no code of a model folder is ever run, and nobody is asked whether it may",
        hint="if you trust the code, build the model in a function of your own and use py:module:factory",
    )


def _items(config: Mapping[str, object], before: str = "") -> Iterator[tuple[str, str, object]]:
    """(place, key, value) of every key, those of inner objects included; JSON is read with bounded depth."""
    for key, value in config.items():
        yield f"{before}{key}", key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                yield from _items(inner, f"{before}{key}.")


def _texts(value: object) -> list[str]:
    """Texts in a value, whatever holds them."""
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def _check_index(index: object, path: Path) -> None:
    names = index.get("weight_map", {}) if isinstance(index, Mapping) else None
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise FileRefusedError(f"{path} is refused: it is no index of weights")
    for name in sorted(set(names.values())):
        check_name(name)


def _check_counts(config: Mapping[str, object], tensors: int, origin: str) -> None:
    """Every layer has a weight of its own, so more layers than tensors are a lie that only costs time."""
    for place, key, value in _items(config):
        counts = value if isinstance(value, list) else [value]
        most = max((n for n in counts if type(n) is int), default=0)
        if COUNT.search(key) and most > max(tensors, 64):
            raise FileRefusedError(
                f"{origin} is refused: its {place!r} is {most}", why=f"its weights are {tensors} tensors in all"
            )


def _tensors_in(path: Path) -> int:
    return len(header_of(path).entries)


def _kind(path: Path) -> str:
    """What a file is, where it is nothing to be read; links to ordinary files are fine (the hub's cache has them)."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"a link that leads nowhere ({error.strerror})"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "a pipe, a device or a socket"


def class_of(transformers: Any, config: Any, word: str) -> Any:
    """The class of transformers that a config names; never anything else that happens to have the name.

    Raises:
        InputError: the name is no model of transformers.
    """
    names = list(config.architectures or ())
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, str(names[0]), None) if CLASS.fullmatch(str(names[0])) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise InputError(
            f"{word} is refused: its config names the class {str(names[0])[:80]!r}",
            why="that is no model of the installed transformers",
            hint="build the model in a function of your own and use py:module:factory",
        )
    return found
