"""How arrays and generators become again what they were: neither is a container, nor a tensor."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, Protocol, cast

import numpy as np
import torch

Undo = Callable[[], None]
_MISSING = object()


def undo_array(value: object) -> Undo:
    """Of what holds numbers by itself: a NumPy array, bytes, an array of Python."""
    if isinstance(value, np.ndarray):
        if not value.flags.writeable or value.dtype.hasobject:
            return lambda: None
        before = value.copy()

        def write() -> None:
            if value.shape == before.shape and value.tobytes() != before.tobytes():
                value[...] = before

        return write
    kept = cast("bytearray | array[Any]", value)[:]

    def replace() -> None:
        if kept != value:
            cast(Any, value)[:] = kept

    return replace


def undo_random(value: object) -> Undo:
    """Of a generator that the model holds."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: cast(None, value.set_state(state))
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    if isinstance(value, np.random.RandomState):
        old = value.get_state()
        return lambda: value.set_state(old)
    bits = cast(np.random.Generator, value).bit_generator
    numpy = bits.state
    return lambda: setattr(bits, "state", numpy)


class LruCache(Protocol):
    """A function that remembers its answers."""

    def cache_info(self) -> tuple[int, int, int | None, int]:
        """Hits, misses, and how many answers there may be and are."""

    def cache_clear(self) -> None:
        """Forget them."""


def undo_answers(function: LruCache) -> Undo:
    """Forget answers once there are new ones: they may be made of weights that were lent; old ones are made anew."""
    misses = function.cache_info()[1]

    def undo() -> None:
        if function.cache_info()[1] != misses:
            function.cache_clear()

    return undo


def undo_variable(variable: ContextVar[object]) -> Undo:
    """A variable of the context has its value again; one that had none, its default, or an emptied container."""
    before = variable.get(_MISSING)

    def undo() -> None:
        now = variable.get(_MISSING)
        if now is before:
            return
        known = _default(variable) if before is _MISSING else before
        if known is not _MISSING:
            variable.set(known)
        elif isinstance(now, (dict, list, set, deque)):  # Python cannot make it unset again
            now.clear()

    return undo


def _default(variable: ContextVar[object]) -> object:
    try:
        return Context().run(variable.get)
    except LookupError:
        return _MISSING
