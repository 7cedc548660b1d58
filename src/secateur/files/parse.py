"""Strict JSON: no NaN, no doubled keys, no depth without end, no text that cannot be written again."""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

from secateur.errors import FileRefusedError

MAX_VALUES = 1 << 22  # what secateur writes for 7 billion weights has a quarter of it
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, *, origin: str, max_depth: int = 64, max_values: int = MAX_VALUES) -> object:
    """Read JSON that may be hostile.

    Args:
        data: UTF-8.
        origin: the file's name for messages.
        max_depth: how deep objects and lists may nest.
        max_values: how many values it may hold; counted by the marks between them, before anything is made of them.

    Returns:
        dicts, lists, str, int, finite float, bool and None.

    Raises:
        FileRefusedError: not UTF-8 or JSON, NaN or infinity (also as 1e999), a doubled key, an integer of
            thousands of digits, half a surrogate pair, deeper than ``max_depth``, or too many values.

    Cost: linear in the size.
    """
    # A key takes as long as three other values.
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) + 3 * data.count(b":") > max_values:
        raise _refused(origin, f"it holds more than {max_values} values")
    if _deeper(data, max_depth):
        raise _refused(origin, f"it nests deeper than {max_depth} levels, or what it opens and closes does not match")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_no_doubles,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        if _SURROGATE.search(data):
            _encode_all(value)
    except (ValueError, RecursionError) as error:
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


def _deeper(data: bytes, max_depth: int) -> bool:
    """Whether brackets nest deeper, seen from the bytes: each pass takes the innermost level away."""
    brackets = _STRING.sub(b"", data).translate(bytes.maketrans(b"{}", b"[]"), _NO_BRACKET)
    for _ in range(max_depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _encode_all(value: object) -> None:
    """Half a surrogate pair is fine in a Python string and in no file."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            item.encode()
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
