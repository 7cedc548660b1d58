"""The global random generators of Python, NumPy and torch as data: read, written, and one stream beside another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NotRequired, TypedDict, cast

import numpy as np
import torch

# Not in the list of names that the package exports to type checkers.
_get_bit_generator: Callable[[], np.random.BitGenerator] = np.random.get_bit_generator  # type: ignore[attr-defined]
_set_bit_generator: Callable[[np.random.BitGenerator], None] = np.random.set_bit_generator  # type: ignore[attr-defined]


class Drawn(TypedDict):
    """Where the generators stand: plain data and tensors, which a checkpoint can hold. `cuda` where it is in use."""

    python: tuple[object, ...]
    numpy: tuple[str, torch.Tensor, int, int, float]
    torch: torch.Tensor
    cuda: NotRequired[list[torch.Tensor]]


def drawn() -> Drawn:
    """Where the generators stand, as plain data and tensors."""
    legacy = np.random.get_state()  # noqa: NPY002 - the users' data may draw from it
    name, keys, place, gauss, cached = cast(tuple[str, object, int, int, float], legacy)
    state: Drawn = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_drawn(state: Drawn) -> None:
    """Put the generators where they stood when `drawn` was called."""
    random.setstate(state["python"])
    name, keys, place, gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


class Stream:
    """Random numbers of one user (the data) that another (the model) cannot move. Of the CPU alone.

    Starts where the generators stand when it is made.

    Cost: some 0.1 milliseconds for each block.

    Example:
        >>> with torch.random.fork_rng():
        ...     stream = Stream()
        ...     with stream.on():
        ...         inside = torch.rand(1)
        ...     bool(torch.rand(1) == inside)
        True
    """

    def __init__(self) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._numpy = np.random.MT19937()
        self._numpy.state = np.random.get_state(legacy=False)  # type: ignore[assignment] # noqa: NPY002

    @contextmanager
    def on(self) -> Iterator[None]:
        """Draw from this stream inside the block."""
        # NumPy's bit generators are exchanged and not their states, which would take ten times as long.
        python, numpy, cpu = random.getstate(), _get_bit_generator(), torch.get_rng_state()
        random.setstate(self._python)
        _set_bit_generator(self._numpy)
        torch.set_rng_state(self._torch)
        try:
            yield
        finally:
            self._python, self._torch = random.getstate(), torch.get_rng_state()
            random.setstate(python)
            _set_bit_generator(numpy)
            torch.set_rng_state(cpu)

    @property
    def state(self) -> Drawn:
        """Where the stream stands, as plain data and tensors."""
        with self.on():
            state = drawn()
        return {"python": state["python"], "numpy": state["numpy"], "torch": state["torch"]}

    @state.setter
    def state(self, state: Drawn) -> None:
        with self.on():
            set_drawn({"python": state["python"], "numpy": state["numpy"], "torch": state["torch"]})
