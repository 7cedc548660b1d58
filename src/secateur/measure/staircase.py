"""The width grid of this machine: kernels work in blocks, so some widths cost no more than the next smaller one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch

STEPS = (1, 2, 4, 8, 16, 32)
WORTH = 0.02  # of the time per column: a smaller gain is noise
WIDTHS = range(32, 97)


@cache
def width_grid(device: str = "cpu", *, rounds: int = 7, timer: Callable[[], float] = time.perf_counter) -> int:
    """The multiple to which widths should be rounded on this device, probed once with matrix products.

    The idea: time [256, 256] x [256, n] for all n in a range and compare the time per column at multiples of
    2, 4, ... with that at all other widths; the multiple that gains most is the grid,
    1 where none gains. A bad guide for layers much smaller than the probe, whose time is overhead.

    Args:
        device: torch device.
        rounds: the fastest of this many interleaved rounds counts.
        timer: a clock in seconds.

    Returns:
        One of 1, 2, 4, ..., 32.

    Cost: some 500 small products, well under a second; remembered for the process.
    """
    # Wide enough to fill the vector units, small enough that 65 widths take a moment.
    left = torch.ones(256, 256, device=device)
    rights = {n: torch.ones(256, n, device=device) for n in WIDTHS}
    best = dict.fromkeys(WIDTHS, float("inf"))
    for _ in range(rounds):
        for n, right in rights.items():
            started = timer()
            torch.mm(left, right)
            if left.is_cuda:
                torch.cuda.synchronize(left.device)
            # The fastest round: whatever disturbs a product makes it slower, never faster.
            best[n] = min(best[n], (timer() - started) / n)
    shares = {step: _share(best, step) for step in STEPS[1:]}
    best_step = min(shares, key=lambda step: shares[step])
    return best_step if shares[best_step] < 1 - WORTH else 1


def _share(best: Mapping[int, float], step: int) -> float:
    """Time per column at multiples of `step` over that at all other widths."""
    on = [value for n, value in best.items() if n % step == 0]
    off = [value for n, value in best.items() if n % step]
    return float(np.mean(on) / np.mean(off))
