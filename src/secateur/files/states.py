"""The state of a run as plain data and tensors, and back: no code is written and none is read.

Plain values stand in JSON as they are. What JSON does not spell is a mapping with the one key ``$kind``: tensors by
name, tuples, mappings whose keys are no texts (the state of optimizers), and numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import FileRefusedError, UnsupportedError
from secateur.files.parse import parse_json
from secateur.files.safe import load_metadata, load_tensors, save_tensors
from secateur.files.seeds import canonical_json

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR, _TUPLE, _MAP, _FLOAT = "$tensor", "$tuple", "$map", "$float"
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(state: object) -> tuple[object, dict[str, Tensor]]:
    """A state as what JSON holds, and the tensors that stand in it by name.

    Args:
        state: mappings, lists, tuples, tensors, texts, numbers, bools and None, nested.

    Returns:
        the tree, and name -> tensor.

    Raises:
        UnsupportedError: names the place of what is none of these.

    Example:
        >>> encode({"lr": 0.1, "betas": (0.9, float("inf"))})
        ({'lr': 0.1, 'betas': {'$tuple': [0.9, {'$float': 'inf'}]}}, {})
    """
    tensors: dict[str, Tensor] = {}
    return _encode(state, "", tensors), tensors


def decode(tree: object, tensors: Mapping[str, Tensor]) -> object:
    """What `encode` was given.

    Args:
        tree: its first result, as it was read again.
        tensors: its second.

    Raises:
        FileRefusedError: a kind that is not known, or a tensor that is missing.
    """
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree), "")
    if len(tree) != 1 or not kind.startswith("$"):
        return {key: decode(value, tensors) for key, value in tree.items()}
    return _special(kind, tree[kind], tensors)


TREE = "state"
"""The field of a file's header that holds the plain part."""


def save_state(path: str | Path, state: Mapping[str, object]) -> str:
    """Write a state as one safetensors file, atomically: what ``state_dict()`` of a pruner or an optimizer gave.

    Args:
        path: of the file.
        state: see `encode`.

    Returns:
        the SHA-256 of the file.

    Raises:
        UnsupportedError: it holds something else.
    """
    tree, tensors = encode(state)
    return save_tensors(path, tensors, {TREE: canonical_json(tree)})


def load_state(path: str | Path) -> dict[str, Any]:
    """Read it back.

    Raises:
        FileRefusedError: it is no such file, or is damaged.
    """
    text = load_metadata(path).get(TREE)
    if text is None:
        raise FileRefusedError(f"{path} holds no state", hint="give a file that save_state has written")
    found = decode(parse_json(text.encode(), origin=str(path)), load_tensors(path))
    if not isinstance(found, dict):
        raise FileRefusedError(f"{path} is damaged", why="its state is no mapping")
    return found


def _encode(value: object, place: str, tensors: dict[str, Tensor]) -> object:
    import torch

    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)}{place}"
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):  # numpy's float64 is one
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, Mapping):
        return _mapping(value, place, tensors)
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{place}.{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    raise UnsupportedError(
        f"{type(value).__name__} at {place.lstrip('.') or 'the top'} cannot be kept in a checkpoint",
        why="a checkpoint holds data only: tensors, numbers, texts, lists and mappings",
        hint="use an optimizer or a schedule whose state is such data",
    )


def _mapping(value: Mapping[object, object], place: str, tensors: dict[str, Tensor]) -> object:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _encode(item, f"{place}.{key}", tensors) for key, item in value.items()}
    pairs = [
        [_encode(key, place, tensors), _encode(item, f"{place}.{str(key)[:80]}", tensors)]
        for key, item in value.items()
    ]
    return {_MAP: pairs}


def _special(kind: str, value: Any, tensors: Mapping[str, Tensor]) -> object:
    try:
        if kind == _TENSOR:
            return tensors[value]
        if kind == _FLOAT:
            return _FLOATS[value]
        if kind == _TUPLE:
            return tuple(decode(item, tensors) for item in value)
        if kind == _MAP:
            return {decode(key, tensors): decode(item, tensors) for key, item in value}
    except (KeyError, TypeError, ValueError) as error:
        raise FileRefusedError(f"a checkpoint is refused: {kind} {str(value)[:80]!a} stands for nothing") from error
    raise FileRefusedError(f"a checkpoint is refused: it holds the unknown kind {kind[:40]!a}")
