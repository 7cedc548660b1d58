"""The state of a pruner as one file: tensors as safetensors, everything else as JSON beside them; no code in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import FileRefusedError
from secateur.files import canonical_json, load_metadata, load_tensors, save_tensors

KEY = "pruner"
_TENSOR, _PAIRS, _LIST = "tensor", "pairs", "list"


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write what ``state_dict()`` of a pruner, a penalty or an optimizer gave, atomically.

    Args:
        path: of the file.
        state: mappings, lists, tuples, tensors, numbers, texts, None.

    Raises:
        TypeError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = canonical_json(_flatten(state, tensors))
    save_tensors(path, tensors, {KEY: skeleton})


def load_state(path: str | Path) -> dict[str, Any]:
    """Read it back.

    Raises:
        FileRefusedError: it is no such file.
    """
    text = load_metadata(path).get(KEY)
    if text is None:
        raise FileRefusedError(f"{path} holds no state of a pruner")
    found = _build(json.loads(text), load_tensors(path), path)
    if not isinstance(found, dict):
        raise FileRefusedError(f"{path} is damaged")
    return found


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        # Pairs, since the keys of an optimizer's state are numbers.
        return {_PAIRS: [[key, _flatten(one, tensors)] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        return {_LIST: [_flatten(one, tensors) for one in value]}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a state cannot hold {type(value).__name__}")


def _build(value: Any, tensors: Mapping[str, Tensor], path: str | Path) -> Any:
    if not isinstance(value, dict):
        return value
    try:
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _PAIRS in value:
            return {key: _build(one, tensors, path) for key, one in value[_PAIRS]}
        return [_build(one, tensors, path) for one in value[_LIST]]
    except (KeyError, TypeError, ValueError) as error:
        raise FileRefusedError(f"{path} is damaged", why=str(error)) from error
