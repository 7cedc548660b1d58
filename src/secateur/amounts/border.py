"""Where an exact selection ends: the last unit that goes, found in a few passes and without a copy of the scores.

A selection of the k lowest of n numbers needs the k-th lowest value and how many of its ties still go. A sort, and
`torch.kthvalue` too, copy everything. Here floating-point numbers are read as whole numbers of the same order, and
their digits of 16 bits are counted from the left, until so few numbers share the digits of the border that they can
be copied and selected from. Nothing but a histogram and about one chunk is held at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements read at once: large enough to be quick, small enough to stay in a processor's cache
_DIGIT = 16  # bits that one histogram settles

Chunks = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Border:
    """The last unit that goes: all below `value` go, and of those that equal it the first `ties`.

    Args:
        value: a number of the dtype that was searched, held exactly.
        ties: how many units of exactly this value go, in order; at least 1.
    """

    value: float
    ties: int


def find_border(chunks: Chunks, count: int, total: int, dtype: torch.dtype) -> Border:
    """The border of the `count` lowest numbers.

    Args:
        chunks: gives tensors of `dtype` with the same numbers each time that it is called; no NaN.
        count: 1 to `total`.
        total: how many numbers there are.
        dtype: torch.float32 or torch.float64.

    Returns:
        the exact border; -0.0 and 0.0 are equal.

    Cost:
        As a rule two passes: one histogram, one over the few numbers that share its digit. Where very many numbers
        are equal or nearly so, at most one pass per 16 bits. Memory for one chunk and a histogram of 0.5 MiB.

    Example:
        >>> find_border(lambda: [torch.tensor([3.0, 1.0]), torch.tensor([1.0])], 2, 3, torch.float32)
        Border(value=1.0, ties=2)
    """
    bits = 64 if dtype == torch.float64 else 32
    prefix, below, known = 0, 0, 0  # the first `known` bits of the border, and how many numbers lie below them
    while total > CHUNK and known < bits:
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for chunk in chunks():
            keys = _keys(chunk)
            keys = keys[_share(keys, prefix, known, bits)]
            digits = keys.bitwise_right_shift(bits - known - _DIGIT).bitwise_and_((1 << _DIGIT) - 1)
            histogram += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        digit = int(torch.searchsorted(histogram.cumsum(0), count - below))
        below += int(histogram[:digit].sum())
        total = int(histogram[digit])
        prefix, known = prefix << _DIGIT | digit, known + _DIGIT
    if known == bits:
        return Border(_number(prefix, bits), count - below)  # more ties than a chunk holds
    near = torch.cat([chunk[_share(_keys(chunk), prefix, known, bits)].cpu() for chunk in chunks()])
    value = near.kthvalue(count - below).values
    return Border(float(value), count - below - int((near < value).sum()))


def floored(values: Tensor, floor: int, dtype: torch.dtype) -> Chunks:
    """Chunks in which the `floor` units that would go last are +inf, so that a selection leaves them."""
    plain = partial(flat_chunks, values, dtype)
    if floor == 0:
        return plain
    if floor == 1:  # the default, on every weight of a model: one pass, and no copy but of one chunk
        return partial(_with_best_kept, plain, _place_of_best(plain()))
    if floor >= values.numel():
        return lambda: (torch.full_like(chunk, torch.inf) for chunk in plain())
    border = find_border(plain, values.numel() - floor, values.numel(), dtype)
    return lambda: (
        chunk.masked_fill(stays, torch.inf) for chunk, stays in zip(plain(), kept_chunks(plain(), border), strict=True)
    )


def _place_of_best(chunks: Iterable[Tensor]) -> int:
    """Number of the unit that would go last: the highest, of equal ones the last."""
    best, place, start = None, -1, 0
    for chunk in chunks:
        high = chunk.max()
        if best is None or bool(high >= best):
            best, place = high, start + int(torch.nonzero(chunk == high)[-1])
        start += chunk.numel()
    return place


def _with_best_kept(plain: Chunks, place: int) -> Iterator[Tensor]:
    start = 0
    for chunk in plain():
        inside = start <= place < start + chunk.numel()
        yield chunk.index_fill(0, torch.tensor(place - start, device=chunk.device), torch.inf) if inside else chunk
        start += chunk.numel()


def kept_chunks(chunks: Iterable[Tensor], border: Border) -> Iterator[Tensor]:
    """For each chunk, in order, a bool tensor: True where a number lies beyond the border and stays."""
    missing = border.ties
    for chunk in chunks:
        stays = chunk >= border.value
        if missing:
            # Ties go in order, so what one chunk has used up the next ones may keep.
            ties = torch.nonzero(chunk == border.value).flatten()[:missing]
            stays[ties] = False
            missing -= len(ties)
        yield stays


def flat_chunks(values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The numbers of a tensor in row-major order, a chunk at a time, as `dtype`; rows are copied, never the tensor."""
    if values.is_contiguous():
        yield from (chunk.to(dtype) for chunk in torch.split(values.view(-1), CHUNK))
    elif values[0].numel() <= CHUNK:
        rows = max(CHUNK // max(values[0].numel(), 1), 1)
        yield from (block.reshape(-1).to(dtype) for block in torch.split(values, rows))
    else:
        for row in values:  # one row is larger than a chunk: split it in the same way
            yield from flat_chunks(row, dtype)


def assemble(pieces: Iterator[Tensor], like: Tensor) -> Tensor:
    """One bool tensor of the shape of `like` from the next pieces, in row-major order; takes no more than it needs."""
    whole = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    flat, start = whole.view(-1), 0
    while start < len(flat):
        piece = next(pieces)
        flat[start : start + len(piece)] = piece
        start += len(piece)
    return whole


def drop_from_rows(lines: Tensor, keep: Tensor, count: int) -> None:
    """Write False at the `count` lowest of each line, in blocks of rows: a selection copies what it reads."""
    if count == 0 or lines.numel() == 0:
        return
    rows = max(CHUNK // math.prod(lines.shape[1:]), 1)
    for block, out in zip(torch.split(lines, rows), torch.split(keep, rows), strict=True):
        matrix = at_least_single(block).flatten(1)
        border = matrix.kthvalue(count, dim=1, keepdim=True).values
        below, ties = matrix < border, matrix == border
        missing = count - below.sum(1, keepdim=True)
        # Of the ties with the last one, as many as are still missing, counted from the left.
        out.copy_(~(below | (ties & (ties.cumsum(1) <= missing))).view(block.shape))


def at_least_single(values: Tensor) -> Tensor:
    """The same numbers as float32, or float64 where they are that."""
    # Half-precision numbers are all float32 numbers, and kernels for those exist on every device.
    return values.to(torch.promote_types(values.dtype, torch.float32))


def common_dtype(values: Sequence[Tensor]) -> torch.dtype:
    """float64 if one of the tensors is, else float32, which holds every number of the shorter formats."""
    return torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32


def _keys(chunk: Tensor) -> Tensor:
    """Whole numbers whose bits, read without a sign, are in the order of the floating-point numbers."""
    bits = 64 if chunk.dtype == torch.float64 else 32
    # Adding zero makes +0.0 of -0.0: they are equal numbers with different bits.
    raw = (chunk + 0.0).view(torch.int64 if bits == 64 else torch.int32)
    # Negative numbers are stored by size, so their order is turned round; then the sign bit is made to count up.
    return raw ^ (raw >> (bits - 1) & (1 << (bits - 1)) - 1) ^ -(1 << (bits - 1))


def _share(keys: Tensor, prefix: int, known: int, bits: int) -> Tensor | slice:
    """Which keys begin with the bits that are known; an index."""
    if known == 0:
        return slice(None)
    # The shift drags the sign along, so what it brings in is masked before the comparison.
    return keys.bitwise_right_shift(bits - known).bitwise_and_((1 << known) - 1) == prefix


def _number(key: int, bits: int) -> float:
    top = 1 << (bits - 1)
    raw = key ^ top if key & top else ~key & (2 * top - 1)
    whole, number = (">Q", ">d") if bits == 64 else (">I", ">f")
    return float(struct.unpack(number, struct.pack(whole, raw))[0])
