"""How arrays and generators become again what they were: neither is a container, nor a tensor."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

Undo = Callable[[], None]


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
