"""The header of a safetensors file: built, and checked before a single tensor is believed.

A file is 8 bytes with the header's length N (little endian), N bytes of JSON, then the bytes of all tensors
without holes. Source: format description in the safetensors project, version 0.8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeGuard

from secateur.errors import FileRefusedError
from secateur.files.parse import parse_json
from secateur.files.sniff import MAX_HEADER

ITEM_SIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
MAX_VALUES = 1 << 21  # some 100,000 tensors: two seconds of reading
_MAX_DIMS, _MAX_ELEMENTS = 64, 2**60  # torch takes no more dimensions; products beyond it would overflow in C


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype as the file spells it, and its bytes ``[begin, end)`` after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """All tensors in the order of their bytes, and the file's free text fields."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Write the header for tensors whose bytes follow in the given order.

    Args:
        tensors: (name, dtype, shape) of each.
        metadata: free text fields.

    Returns:
        Length and JSON, padded so that the first tensor starts at a multiple of 8. The same input gives the
        same bytes, in any process.
    """
    # In the order of the bytes; JSON keys keep it, so the same tensors give the same header.
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + ITEM_SIZE[dtype] * prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    # The length of 8 bytes and a multiple of 8: readers may map the tensors into memory as they lie.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse_header(text: bytes, *, payload: int, origin: str) -> Header:
    """Read a header and check every claim it makes.

    Args:
        text: the JSON part.
        payload: how many bytes follow it in the file.
        origin: the file's name for messages.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        FileRefusedError: bad JSON, unknown dtype, a shape that is no list of sizes, offsets that do not fit
            the shape, overlap, a hole, or bytes before or after the tensors.
    """
    table = parse_json(text, origin=f"the header of {origin}", max_depth=4, max_values=MAX_VALUES)
    if not isinstance(table, dict):
        raise corrupt(origin, "the header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise corrupt(origin, "the metadata holds something else than text")
    entries = sorted((_entry(k, v, origin) for k, v in table.items()), key=lambda e: (e.begin, e.end, e.name))
    # Sorted by their bytes and each beginning where the last one ended: no overlap can hide, and nothing between.
    at = 0
    for entry in entries:
        if entry.begin != at:
            kind = "overlaps another tensor" if entry.begin < at else "leaves a hole before it"
            raise corrupt(origin, f"tensor {entry.name[:80]!a} {kind}")
        at = entry.end
    if at != payload:
        said = "is truncated" if at > payload else "has extra bytes at its end"
        raise corrupt(origin, f"it {said}: the header speaks of {at} bytes of tensors, {payload} are there")
    return Header(tuple(entries), metadata)


def _entry(name: str, value: object, origin: str) -> Entry:
    shown = f"tensor {name[:80]!a}"  # names in a file can be long and hold anything
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(origin, f"{shown} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise corrupt(origin, f"{shown} has the unknown dtype {str(dtype)[:20]!a}")
    if not _sizes(shape) or len(shape) > _MAX_DIMS or prod(max(d, 1) for d in shape) > _MAX_ELEMENTS:
        raise corrupt(origin, f"{shown} has no sensible shape")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(origin, f"{shown} has no sensible data_offsets")
    if offsets[1] - offsets[0] != prod(shape) * ITEM_SIZE[dtype]:
        raise corrupt(origin, f"{shown} has another number of bytes than its shape and dtype need")
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: object) -> TypeGuard[list[int]]:
    # By exact type: True is an int for Python, and no size.
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def header_length(prefix: bytes, *, size: int, origin: str) -> int:
    """Read the length of the header from a file's first 8 bytes and check it against the file's size."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        raise corrupt(origin, "it is truncated: shorter than 8 bytes")
    if length > MAX_HEADER or length < 2:
        raise corrupt(origin, f"it claims a header of {length} bytes")
    if length > size - 8:
        raise corrupt(origin, f"it is truncated: it claims a header of {length} bytes and has {size} in all")
    return length


def corrupt(origin: str, why: str) -> FileRefusedError:
    """The error for a damaged or lying file."""
    return FileRefusedError(
        f"{origin} is refused: it is corrupt or was tampered with", why=why, hint="get the file again"
    )
