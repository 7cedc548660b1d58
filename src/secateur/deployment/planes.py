"""A tensor in as few bytes as a lossless coder of single symbols needs: its zeros, and the planes of the rest.

Zeros are one bit per number. Of the numbers that stay, bytes of equal rank follow each other: those of the exponents
take few values, and cost two to three bits instead of eight; those of the mantissas are as good as random and stay as
they are. Pruning by magnitude removes small exponents, so what stays codes better than what was there.

Cost: one pass over the tensor, and zlib's over its planes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import InputError

Words = npt.NDArray[np.unsignedinteger]
_WORDS: dict[int, tuple[torch.dtype, type[np.unsignedinteger]]] = {
    1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64),
}  # fmt: skip
# Their sign stands before the exponent; one turn to the left puts the exponent into a byte of its own.
_SIGN_FIRST = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
RAW, DEFLATE = "raw", "deflate"
WORTH = 1 / 64  # of a plane that a coder has to save: below it only loading would get slower
REPEATS = 4  # a plane that shrinks so much has runs, or symbols below one bit, which a search for repeats finds
MOST_RATIO = 1100  # deflate makes at most 1032 bytes of one


@dataclass(frozen=True)
class Plane:
    """Bytes of one rank, or the bits that say where numbers are.

    Args:
        coder: "raw" or "deflate".
        size: bytes that it decodes to.
        stored: bytes that it has in the file.
    """

    coder: str
    size: int
    stored: int


@dataclass(frozen=True)
class Coded:
    """What a decoder has to know of a tensor.

    Args:
        dtype: as torch spells it, for example "bfloat16".
        shape: of the tensor.
        masked: whether the first plane says where numbers are; else all are there.
        planes: in the order of their bytes.
        sha256: of the bytes of the tensor and of its planes behind them: what was decoded is what was coded, and no bit
            of the planes is another, also among those that fill up a last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    masked: bool
    planes: tuple[Plane, ...]
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of the tensor itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return prod(self.shape) * dtype.itemsize


def encode(tensor: Tensor) -> tuple[Coded, bytes]:
    """Take a tensor apart and code its planes.

    Args:
        tensor: dense, of any device, shape and dtype.

    Returns:
        what a decoder has to know, and the planes behind each other.

    Example:
        >>> tensor = torch.tensor([0.0, 1.5, 0.0, -0.0])
        >>> torch.equal(decode(*encode(tensor)), tensor)
        True
    """
    found = _words(tensor)
    kept = found != 0
    masked = not bool(kept.all())
    parts = [np.packbits(kept, bitorder="little").tobytes()] if masked else []
    values = found[kept] if masked else found
    parts += _bytes_by_rank(_turned(values, 1) if tensor.dtype in _SIGN_FIRST else values)
    coded = [_code(part) for part in parts]
    planes = tuple(Plane(coder, len(part), len(data)) for part, (coder, data) in zip(parts, coded, strict=True))
    dtype, whole = str(tensor.dtype).removeprefix("torch."), b"".join(data for _, data in coded)
    return Coded(dtype, tuple(tensor.shape), masked, planes, _digest(found, whole)), whole


def decode(coded: Coded, data: bytes | memoryview) -> Tensor:
    """The tensor that was coded, bit for bit.

    Args:
        coded: what `encode` said of it.
        data: the planes.

    Raises:
        InputError: the planes are damaged, do not fit the tensor, or give another one than was coded.

    Cost: memory for the tensor twice; no more, whatever the planes hold.
    """
    dtype, count = getattr(torch, coded.dtype), prod(coded.shape)
    kind = _WORDS[dtype.itemsize][1]
    parts = list(_parts(coded, memoryview(data)))
    kept = _mask(parts.pop(0), count) if coded.masked else None
    there = count if kept is None else int(np.count_nonzero(kept))
    values = _of_ranks(parts, there, kind)
    if dtype in _SIGN_FIRST:
        values = _turned(values, 8 * dtype.itemsize - 1)
    if kept is not None:
        whole = np.zeros(count, kind)
        whole[kept] = values
        values = whole
    if _digest(values, data) != coded.sha256:
        raise InputError("another tensor came out than was packed", why="its SHA-256 is another")
    return _tensor(values, dtype).reshape(coded.shape)


def _digest(words: Words, planes: bytes | memoryview) -> str:
    found = hashlib.sha256(words.data)
    found.update(planes)
    return found.hexdigest()


def _words(tensor: Tensor) -> Words:
    """The bits as whole numbers, in one row."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    signed, unsigned = _WORDS[tensor.element_size()]
    # torch sees an empty tensor of complex numbers as one that cannot be taken apart.
    return plain.view(signed).numpy().view(unsigned) if plain.numel() else np.zeros(0, unsigned)


def _tensor(words: Words, dtype: torch.dtype) -> Tensor:
    signed = _WORDS[dtype.itemsize][0]
    if dtype == torch.bool and words.size and int(words.max()) > 1:
        raise InputError("truth values other than 0 and 1 came out")
    plain = torch.from_numpy(words if signed == torch.uint8 else words.view(f"i{dtype.itemsize}"))
    return plain.view(dtype) if words.size else torch.empty(0, dtype=dtype)


def _turned(words: Words, places: int) -> Words:
    """The bits of every number, moved to the left in a ring."""
    width = 8 * words.itemsize
    kind = words.dtype.type
    return (words << kind(places)) | (words >> kind(width - places))


def _bytes_by_rank(words: Words) -> list[bytes]:
    """All first bytes, then all second ones and so on, the highest first."""
    # By shifts and not by views: the order of bytes in memory is another on some machines.
    return [(words >> words.dtype.type(shift)).astype(np.uint8).tobytes() for shift in _shifts(words.itemsize)]


def _of_ranks(parts: Sequence[bytes], count: int, kind: type[np.unsignedinteger]) -> Words:
    shifts = _shifts(np.dtype(kind).itemsize)
    if len(parts) != len(shifts) or any(len(part) != count for part in parts):
        raise InputError("its planes are not those of its numbers", why=f"{count} numbers are there")
    words = np.zeros(count, kind)
    for part, shift in zip(parts, shifts, strict=True):
        words |= np.frombuffer(part, np.uint8).astype(kind) << kind(shift)
    return words


def _shifts(size: int) -> range:
    return range(8 * (size - 1), -1, -8)


def _mask(data: bytes, count: int) -> npt.NDArray[np.bool_]:
    if len(data) != -(-count // 8):
        raise InputError("its mask has another size than the tensor")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little").view(np.bool_)


def _code(data: bytes) -> tuple[str, bytes]:
    """The shorter of the plane itself and what deflate makes of it."""
    # Single symbols first: there is nothing to find for a search in most planes, and it takes ten times as long.
    best = _deflate(data, 1, zlib.Z_HUFFMAN_ONLY)
    if REPEATS * len(best) < len(data):
        best = min(best, _deflate(data, 6, zlib.Z_DEFAULT_STRATEGY), key=len)
    return (DEFLATE, best) if len(best) < (1 - WORTH) * len(data) else (RAW, data)


def _deflate(data: bytes, level: int, strategy: int) -> bytes:
    coder = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    return coder.compress(data) + coder.flush()


def _parts(coded: Coded, data: memoryview) -> Iterator[bytes]:
    at = 0
    for plane in coded.planes:
        yield _decoded(plane, data[at : at + plane.stored])
        at += plane.stored
    if at != len(data):
        raise InputError("it has another number of bytes than its planes", why=f"{len(data)} instead of {at}")


def _decoded(plane: Plane, data: memoryview) -> bytes:
    if plane.coder == RAW:
        found, whole = bytes(data), True
    else:
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # One byte more than there may be, and never more: a file must not choose how much memory it takes.
            found = decoder.decompress(data, plane.size + 1)
        except zlib.error as error:
            raise InputError("a plane of it cannot be decoded", why=str(error)) from error
        whole = decoder.eof and not decoder.unused_data
    if len(found) != plane.size or not whole:
        raise InputError("a plane of it does not end where it should")
    return found
