"""Strict JSON: no NaN, no doubled keys, no depth without end, no text that cannot be written again."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from secateur.errors import FileRefusedError


def parse_json(data: bytes, *, origin: str, max_depth: int = 64) -> Any:
    """Read JSON that may be hostile.

    Args:
        data: UTF-8.
        origin: the file's name for messages.
        max_depth: how deep objects and lists may nest.

    Returns:
        dicts, lists, str, int, finite float, bool and None.

    Raises:
        FileRefusedError: not UTF-8 or JSON, NaN or infinity (also as 1e999), a doubled key, an integer of
            thousands of digits, half a surrogate pair, or deeper than ``max_depth``.

    Cost: linear in the size.
    """
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_no_doubles,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check(value, max_depth)
    except RecursionError as error:
        raise _refused(origin, f"it nests deeper than {max_depth} levels") from error
    except ValueError as error:
        raise _refused(origin, str(error)) from error
    return value


def _refused(origin: str, why: str) -> FileRefusedError:
    return FileRefusedError(f"{origin} is refused: it is not plain JSON", why=why)


def _no_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        # Readers differ in which of two values they take, so a check by one reader would not bind another.
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {key[:80]!a} occurs twice in one object")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)  # 1e999 is valid JSON, and infinity when it is read
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _check(value: object, max_depth: int) -> None:
    """Walk without recursion: depth, and text that UTF-8 cannot hold."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            item.encode()  # half a surrogate pair is fine in a Python string and in no file
        elif isinstance(item, dict | list):
            if depth > max_depth:
                raise ValueError(f"it nests deeper than {max_depth} levels")
            children = [*item, *item.values()] if isinstance(item, dict) else item
            stack.extend((child, depth + 1) for child in children)
