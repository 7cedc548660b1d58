"""Same inputs, same bytes: seeds that are put back, and JSON with one spelling."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from secateur.errors import NonFiniteError, RecipeError

# What JSON spells as it is. Exact types only: a subclass might not be what it looks like.
_ATOMS = frozenset({str, int, bool, type(None)})


def canonical_json(obj: object) -> str:
    r"""Write plain data as JSON that has one spelling only.

    Keys are sorted by code point, there are no spaces, everything is ASCII, floats are the shortest text that
    reads back as the same float64, and a newline ends it. Tuples become lists.

    Args:
        obj: mappings with text keys, lists, tuples, str, int, float, bool, None.

    Returns:
        One line.

    Raises:
        NonFiniteError: NaN or infinity, with its place.
        TypeError: anything else than plain data.

    Cost: about 0.1 microseconds per item on top of Python's own encoder.

    Example:
        >>> canonical_json({"b": 0.1, "a": (1, None)})
        '{"a":[1,null],"b":0.1}\n'
    """
    # Plans hold hundreds of thousands of numbers. Only what might be refused is walked with its place in hand.
    plain = obj if _surely_plain(obj) else _plain(obj, "$")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def stable_hash(obj: object) -> str:
    """SHA-256, in hex, of plain data; the same in every process, whatever the order of its keys.

    Raises:
        NonFiniteError: NaN or infinity, with its place.
        TypeError: anything else than plain data.
    """
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def _surely_plain(obj: object) -> bool:
    """Whether all of it is of exact, writable types. False settles nothing: `_plain` then looks closely."""
    kind = type(obj)
    if kind in _ATOMS:
        return True
    if isinstance(obj, float) and kind is float:
        return math.isfinite(obj)
    if isinstance(obj, dict) and kind is dict:
        return all(type(key) is str for key in obj) and all(map(_surely_plain, obj.values()))
    if isinstance(obj, list | tuple) and kind in (list, tuple):
        # Lists of integers, which plans are made of, are settled without a call for each.
        return _ATOMS.issuperset(map(type, obj)) or all(map(_surely_plain, obj))
    return False


def _plain(obj: object, place: str) -> object:
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise NonFiniteError(f"{obj} at {place} cannot be written", why="JSON has no NaN and no infinity")
        return obj
    if isinstance(obj, list | tuple):
        return [_plain(item, f"{place}[{number}]") for number, item in enumerate(obj)]
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} at {place} is not text")
        return {key: _plain(value, f"{place}.{key}") for key, value in obj.items()}
    raise TypeError(f"{type(obj).__name__} at {place} is not plain data")


@contextmanager
def seed_everything(seed: int) -> Iterator[None]:
    """Seed every random generator, and put them all back as they were at the end.

    Covers Python's ``random``, numpy's global generator and torch on the CPU and all CUDA devices. It does
    not make kernels deterministic and knows nothing of generators that the user made.

    Args:
        seed: 0 <= seed < 2**32 (numpy takes no more).

    Raises:
        RecipeError: the seed is out of range.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise RecipeError(f"seed must be an integer from 0 to 2**32 - 1, not {seed!r}")
    from secateur.model.guard import generators  # not at the top: recipes are read without torch

    with generators(seed):
        yield
