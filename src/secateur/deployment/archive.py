"""A safetensors file of coded tensors: the smallest form that gives every tensor back bit for bit.

Under each name stand the planes of its tensor as bytes, and in the metadata what a decoder has to know, among it a
SHA-256 of each tensor. The metadata have one of their own: no bit of such a file can change unnoticed, also where
nobody kept the hash of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from secateur.deployment.planes import DEFLATE, MOST_RATIO, RAW, Coded, Plane, decode, encode
from secateur.errors import FileRefusedError, InputError
from secateur.files import canonical_json, save_tensors, stable_hash
from secateur.files.header import corrupt
from secateur.files.parse import parse_json
from secateur.files.safe import check_tensor, dtype_names, load_with_metadata, memory, split_aliases

FIELD, VERSION = "archive", 1
_ELSE = {"format": "pt"}  # what the writer of the file adds for other readers
_FIELDS = {"dtype", "shape", "masked", "planes", "sha256"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
A = TypeVar("A")
B = TypeVar("B")


def save_archive(path: str | Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors in as few bytes as they need without a loss, whole or not at all.

    Args:
        path: the file; one that exists is replaced in one step.
        tensors: name -> dense tensor of any device, shape and dtype that safetensors knows.

    Returns:
        SHA-256 of the file. The same tensors give the same bytes, as long as zlib is the same.

    Raises:
        InputError: a sparse, quantised or meta tensor, or a dtype that the format lacks.
        ResourceError: the disk is full.

    Cost: some 20 MB/s of tensors and thread, most of it in zlib; memory for what is coded and one tensor a thread.

    Example:
        >>> import tempfile
        >>> weight = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, -2.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_archive(f"{folder}/small.safetensors", {"weight": weight})
        ...     found = load_archive(f"{folder}/small.safetensors")
        >>> torch.equal(found["weight"], weight)
        True
    """
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    stored, aliases = split_aliases(tensors)
    coded = dict(zip(stored, _beside(encode, stored.values()), strict=True))
    blobs = {name: _blob(data) for name, (_, data) in coded.items()}
    # One object under both names is what the writer of the file knows a tie by.
    blobs |= {alias: blobs[name] for alias, name in aliases.items()}
    records = {name: _record(record) for name, (record, _) in coded.items()}
    said = {"version": VERSION, "tensors": records, "ties": aliases}
    return save_tensors(path, blobs, {FIELD: canonical_json({**said, "sha256": stable_hash(said)})})


def load_archive(
    path: str | Path, *, sha256: str | None = None, within: str | Path | None = None, max_bytes: int | None = None
) -> dict[str, Tensor]:
    """Read what `save_archive` wrote, and check that every tensor is the one that was written.

    Args:
        path: the file.
        sha256: what `save_archive` returned, where it was kept.
        within: where `path` is a name that was read from another file: the folder it must not leave.
        max_bytes: most bytes of decoded tensors; told by the header, before memory is asked for.

    Returns:
        name -> tensor on the CPU, sorted by name; tied names share one tensor again.

    Raises:
        FileRefusedError: no archive, unsafe, damaged, truncated, larger than `max_bytes`, or another SHA-256.

    Cost: some 100 MB/s of decoded tensors and thread; memory for one tensor per thread beside the result.
    """
    origin = str(path if within is None else Path(within) / path)
    blobs, fields = load_with_metadata(path, sha256=sha256, within=within, max_bytes=max_bytes)
    if FIELD not in fields:
        raise FileRefusedError(f"{origin} is refused: it is no archive", hint="read it as plain safetensors")
    records, ties = _records(fields.pop(FIELD), origin)
    there = {name: len(blob) for name, blob in blobs.items() if name not in ties}
    if fields != _ELSE or any(blobs.get(alias) is not blobs.get(name) for alias, name in ties.items()):
        raise corrupt(origin, "its header does not say what its metadata say")
    _require_fit(records, there, max_bytes, origin)

    def one(name: str) -> Tensor:
        try:
            return decode(records[name], blobs[name].numpy().data)
        except InputError as error:
            raise corrupt(origin, f"the tensor {name[:80]!a}: {error.what}") from error

    found = dict(zip(records, _beside(one, records), strict=True))
    return dict(sorted({**found, **{alias: found[name] for alias, name in ties.items()}}.items()))


def _beside(work: Callable[[A], B], things: Iterable[A]) -> list[B]:
    """The same for each, in as many threads as torch takes: zlib and numpy let Python go on meanwhile."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, things))


def _blob(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _record(coded: Coded) -> dict[str, object]:
    return {**asdict(coded), "planes": [[plane.coder, plane.size, plane.stored] for plane in coded.planes]}


def _records(text: str, origin: str) -> tuple[dict[str, Coded], dict[str, str]]:
    """What stands of every tensor that is stored, and the names of those that are tied to them."""
    said = parse_json(text.encode(), origin=f"the metadata of {origin}", max_depth=6)
    if not isinstance(said, dict) or said.get("version") != VERSION:
        raise FileRefusedError(
            f"{origin} is refused: it is no archive of version {VERSION}", hint="a newer secateur may read it"
        )
    digest, tensors, ties = said.pop("sha256", None), said.get("tensors"), said.get("ties")
    if digest != stable_hash(said) or not isinstance(tensors, dict) or not isinstance(ties, dict):
        raise corrupt(origin, "its metadata are not as they were written")
    if not all(isinstance(name, str) and name in tensors for name in ties.values()) or tensors.keys() & ties.keys():
        raise corrupt(origin, "its table of tied tensors names what is not there, or is there twice")
    return {
        name: _read(value, f"the record of the tensor {name[:80]!a}", origin) for name, value in tensors.items()
    }, ties


def _read(value: object, what: str, origin: str) -> Coded:
    if not isinstance(value, dict) or set(value) != _FIELDS or not isinstance(value["planes"], list):
        raise corrupt(origin, f"{what} does not have exactly {', '.join(sorted(_FIELDS))}")
    known = {str(dtype).removeprefix("torch.") for dtype in dtype_names()}
    shape, planes = value["shape"], [_plane(each) for each in value["planes"]]
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise corrupt(origin, f"{what} has no sensible shape")
    # Sizes are what memory is asked for, so they are held against the bytes that are there before.
    if value["dtype"] not in known or type(value["masked"]) is not bool or None in planes:
        raise corrupt(origin, f"{what} has another dtype or other planes than are ever written")
    if not isinstance(value["sha256"], str) or not _SHA256.fullmatch(value["sha256"]):
        raise corrupt(origin, f"{what} has no SHA-256")
    whole = tuple(plane for plane in planes if plane is not None)
    return Coded(value["dtype"], tuple(shape), value["masked"], whole, value["sha256"])


def _plane(value: object) -> Plane | None:
    """A plane as it stands in the metadata; None where none such is ever written."""
    if not isinstance(value, list) or len(value) != 3:
        return None
    coder, size, stored = value
    if coder not in (RAW, DEFLATE) or type(size) is not int or type(stored) is not int:
        return None
    most = stored if coder == RAW else MOST_RATIO * stored
    return Plane(coder, size, stored) if 0 <= size <= most else None


def _require_fit(records: Mapping[str, Coded], there: Mapping[str, int], max_bytes: int | None, origin: str) -> None:
    """What the metadata say of tensors and planes must fit the bytes that are there, and the memory."""
    if set(records) != set(there):
        raise corrupt(origin, "its tensors are not those that its metadata list")
    for name, coded in records.items():
        if sum(plane.stored for plane in coded.planes) != there[name] or len(coded.planes) < coded.masked:
            raise corrupt(origin, f"the tensor {name[:80]!a} has other planes than its record says")
    total = sum(coded.size for coded in records.values())
    if total > min(memory(), memory() if max_bytes is None else max_bytes):
        raise FileRefusedError(
            f"{origin} is refused: it holds {total} bytes of tensors",
            why="they do not belong to this model, or do not fit into the memory of this machine",
        )
