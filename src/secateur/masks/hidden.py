"""The values that masks hide, kept without an index: in the order in which their elements lie."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements; torch forms positions of 8 bytes and more per element where it selects or scatters
FAR = 1 << 22  # the same on an accelerator, which would wait for the processor once for every block


def take(tensor: Tensor, drop: Tensor) -> Tensor:
    """The elements of a tensor where `drop` is True, in row-major order.

    Args:
        tensor: any shape.
        drop: bool, the same shape or of size 1 in some dimensions.

    Returns:
        vector of the tensor's dtype, of its own memory.
    """
    whole = drop.expand(tensor.shape)
    taken = tensor.new_empty(int(torch.count_nonzero(whole)))
    start = 0
    for values, gone in _blocks(tensor.detach(), whole):
        piece = values.masked_select(gone)
        taken[start : start + len(piece)] = piece
        start += len(piece)
    return taken


def put(tensor: Tensor, drop: Tensor, values: Tensor) -> None:
    """Write back in place what `take` took, bit for bit."""
    start = 0
    *first, last = _blocks(tensor.detach(), drop.expand(tensor.shape))
    for target, gone in first:
        stop = start + int(torch.count_nonzero(gone))
        target.masked_scatter_(gone, values[start:stop])
        start = stop
    # What is left is for the last block: without a count nothing has to come back from an accelerator.
    last[0].masked_scatter_(last[1], values[start:])


def _blocks(tensor: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of both, row by row, as views."""
    block = BLOCK if tensor.device.type == "cpu" else FAR
    if tensor.dim() == 0:
        yield tensor.view(1), mask.view(1)
    elif tensor.dim() > 1 and tensor.numel() > block * tensor.shape[0]:  # a single row is larger than a block
        for row, own in zip(tensor, mask, strict=True):
            yield from _blocks(row, own)
    else:
        rows = max(block * tensor.shape[0] // max(tensor.numel(), 1), 1)
        yield from zip(torch.split(tensor, rows), torch.split(mask, rows), strict=True)
