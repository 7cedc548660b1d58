"""Compact, exact JSON forms of index sets and masks."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from itertools import chain
from math import ceil, prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import FileRefusedError

MAX_ELEMENTS = 2**34
MAX_KEPT = 2**25  # indices that all cuts of a plan together spell out: 256 MB


def intervals(indices: Tensor | npt.NDArray[np.int64]) -> list[list[int]]:
    """Ascending indices as half-open runs: [0, 1, 2, 5] -> [[0, 3], [5, 6]]."""
    values = np.asarray(indices)
    if len(values) == 0:
        return []
    breaks = np.flatnonzero(np.diff(values) != 1)
    starts = np.concatenate([values[:1], values[breaks + 1]])
    stops = np.concatenate([values[breaks], values[-1:]]) + 1
    return [[int(a), int(b)] for a, b in zip(starts, stops, strict=True)]


def indices(runs: Any, what: str) -> Tensor:
    """Half-open runs as ascending int64 indices.

    Raises:
        FileRefusedError: runs that are not integers, not ascending, overlap, or spell out more than `MAX_KEPT`.
    """
    # By exact type: True is an int for Python, and no index.
    pairs = isinstance(runs, list) and set(map(type, runs)) <= {list} and set(map(len, runs)) <= {2}
    flat = list(chain.from_iterable(runs)) if pairs else []
    if not pairs or not set(map(type, flat)) <= {int}:
        raise FileRefusedError(f"The plan's {what} is not a list of [start, stop] pairs.")
    inside = not flat or (min(flat) >= 0 and max(flat) <= MAX_ELEMENTS)
    bounds = np.asarray(flat if inside else [], np.int64)
    starts, lengths = bounds[::2], bounds[1::2] - bounds[::2]
    if not inside or bool((lengths <= 0).any()) or bool((np.diff(bounds) < 0).any()):
        raise FileRefusedError(f"The plan's {what} holds runs that are negative, unordered or overlapping.")
    if int(lengths.sum()) > MAX_KEPT:
        raise FileRefusedError(f"The plan's {what} spells out more than {MAX_KEPT} indices.")
    before = np.cumsum(lengths) - lengths  # indices that stand before each run
    return torch.from_numpy(np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64))


def pack(mask: Tensor) -> dict[str, object]:
    """A bool mask as shape, number of kept elements, and bits (row-major, first element in the high bit)."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1))
    return {
        "shape": list(mask.shape),
        "kept": int(mask.sum()),
        "bits": base64.b64encode(bits.tobytes()).decode("ascii"),
    }


def unpack(data: Any, what: str) -> Tensor:
    """The mask of `pack`.

    Raises:
        FileRefusedError: fields missing, a wrong number of bits, or a count that does not fit.
    """
    try:
        shape: Sequence[int] = [int(n) for n in data["shape"]]
        kept, text = int(data["kept"]), str(data["bits"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileRefusedError(f"The plan's mask of {what!r} is malformed.", why=str(error)) from error
    size = prod(shape)
    # Seen from the length of the text, before a byte of it is decoded.
    if min(shape, default=0) < 0 or size > MAX_ELEMENTS or len(text) != 4 * ceil(ceil(size / 8) / 3):
        raise FileRefusedError(f"The plan's mask of {what!r} has {len(text)} letters for shape {tuple(shape)}.")
    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise FileRefusedError(f"The plan's mask of {what!r} is malformed.", why=str(error)) from error
    if len(raw) != -(-size // 8):
        raise FileRefusedError(f"The plan's mask of {what!r} has {len(raw)} bytes for shape {tuple(shape)}.")
    bits = np.unpackbits(np.frombuffer(raw, np.uint8))[:size].astype(bool)
    if int(bits.sum()) != kept:
        raise FileRefusedError(f"The plan's mask of {what!r} keeps {int(bits.sum())} elements, not {kept}.")
    return torch.from_numpy(bits).view(*shape) if shape else torch.from_numpy(bits).view(())
