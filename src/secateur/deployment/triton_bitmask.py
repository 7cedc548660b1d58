"""The kernel for the format `bitmask` on a GPU. Importing this file needs Triton: `on_gpu` alone does it.

A program does the eight rows of a panel for one input: it goes through the panel's masks in order, counts their bits
to know where each number lies in the stream, and reads the numbers and the inputs that they go with.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEIGHT, STEP = 8, 16  # of a panel, and columns of a mask: as `formats.bitmask` packs
# Chosen for enough loads in flight, and not tuned: there was no GPU to measure on.
TOGETHER, WARPS = 16, 8


def _panel(
    y: tl.tensor,
    x: tl.tensor,
    values: tl.tensor,
    masks: tl.tensor,
    offsets: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    rows: int,
    columns: int,
    steps: int,
    inputs: int,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    HEIGHT: tl.constexpr,
    STEP: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    # Inputs are neighbours, so those of one panel find its numbers in the cache. Places may need more than 32 bits.
    program = tl.program_id(0).to(tl.int64)
    panel, which = program // inputs, program % inputs
    lane = tl.arange(0, TOGETHER * HEIGHT)  # a mask each: step by step, the rows of a step in turn
    bit = tl.arange(0, STEP)
    sums = tl.zeros([TOGETHER * HEIGHT], dtype=tl.float32)
    start = tl.load(offsets + panel)
    for first in range(0, steps, TOGETHER):
        step = first + lane // HEIGHT
        mask = tl.load(masks + (panel * steps + first) * HEIGHT + lane, mask=step < steps, other=0)
        there = (mask.to(tl.int32)[:, None] >> bit[None, :]) & 1
        count = tl.sum(there, 1)
        # How many numbers lie before each: those of earlier masks, and those of lower bits of its own.
        before = (tl.cumsum(count, 0) - count)[:, None] + tl.cumsum(there, 1) - there
        value = tl.load(values + start + before, mask=there != 0, other=0).to(tl.float32)
        column = step[:, None] * STEP + bit[None, :]
        number = tl.load(x + which * columns + column, mask=there != 0, other=0).to(tl.float32)
        sums += tl.sum(value * number, 1)
        start += tl.sum(count, 0)
    found = tl.sum(tl.reshape(sums, [TOGETHER, HEIGHT]), 0)
    row = panel * HEIGHT + tl.arange(0, HEIGHT)
    if SCALED:
        found *= tl.load(scale + row, mask=row < rows, other=0).to(tl.float32)
    if BIASED:
        found += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(y + which * rows + row, found.to(y.dtype.element_ty), mask=row < rows)


PANEL = triton.jit(_panel)
