"""Scores of one criterion with what they cost: seconds, epochs of the scoring data, memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateur.criteria.base import Context, Criterion
from secateur.errors import InputError
from secateur.model.call import default_loss, device_of, to_device
from secateur.model.guard import guard
from secateur.types import Batch, Loss

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What one call took.

    Args:
        seconds: wall-clock time.
        work_seconds: time that a busy machine does not stretch: that of the processor, or the clock's on CUDA.
        peak_bytes: memory above what was held before, or None where the system does not tell.
    """

    seconds: float
    work_seconds: float
    peak_bytes: int | None


def metered(work: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """Run something, and measure its time and peak memory.

    On CUDA the allocator's peak; on Linux the high-water mark of the process's resident set, which includes
    whatever else runs in the process; elsewhere None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels that still run belong to what was before
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _resident_now()
    start, start_work = time.perf_counter(), _clock(device)()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, worked = time.perf_counter() - start, _clock(device)() - start_work
    if device.type == "cuda":
        return result, Cost(seconds, worked, max(0, torch.cuda.max_memory_allocated(device) - before))
    peak = _status("VmHWM") if before else 0
    return result, Cost(seconds, worked, max(0, peak - before) if peak else None)


def _clock(device: torch.device) -> Callable[[], float]:
    # A GPU runs beside the processor, whose time says nothing there; a CPU is shared, and its wall clock waits.
    return time.perf_counter if device.type == "cuda" else time.process_time


def _resident_now() -> int:
    """Bytes of the resident set, with its high-water mark set back to them; 0 where the system cannot."""
    gc.collect(1)  # young garbage would be freed, or not, in the middle of what is measured
    try:
        # Freed memory that the C library keeps would hide what the next call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError, TypeError):
        return 0
    return _status("VmRSS")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    found = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), "0")
    return 1024 * int(found)


def epoch_seconds(model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> float | None:
    """Work seconds (see `Cost`) of one forward and backward pass over the scoring data: the unit of scoring costs.

    The second of two passes counts: the first one pays for what torch sets up once. None where the batches have no
    target and no loss was given.
    """
    loss_of, device = loss or default_loss, device_of(model)
    taken, clock = None, _clock(device)
    with guard(model, mode="eval", seed=0):
        for _ in range(2):
            started = clock()
            for batch in batches:
                try:
                    value = loss_of(model, to_device(batch, device))
                except InputError:
                    return None
                value.backward()  # type: ignore[no-untyped-call]
                model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = clock() - started
    return taken


def measure_scores(criterion: Criterion, context: Context) -> tuple[dict[str, Tensor], Cost]:
    """Scores on the CPU, and their cost."""
    scores, cost = metered(lambda: criterion.score(context), device_of(context.model))
    # Kept on the CPU, outside of what is metered: scores of single weights are as large as the model.
    return {name: value.cpu() for name, value in scores.items()}, cost


def shuffled(scores: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The scores of each group in random order: every layer loses what it lost, but whichever units.

    Source: Frankle et al., "Pruning Neural Networks at Initialization: Why Are We Missing the Mark?", 2021.
    """
    return {name: _permuted(score, f"{seed}:shuffled:{name}") for name, score in scores.items()}


def inverted(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores with the order of the units of every group turned around.

    Values change places, so that each layer loses as much as before: what is compared is the order alone.
    """
    return {name: _reversed(score) for name, score in scores.items()}


def _permuted(score: Tensor, key: str) -> Tensor:
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
    # A generator of its own: the order depends on seed and name, and on nothing that ran before.
    order = torch.randperm(score.numel(), generator=torch.Generator().manual_seed(number))
    return score.flatten()[order].view(score.shape)


def _reversed(score: Tensor) -> Tensor:
    flat = score.flatten()
    order = torch.argsort(flat, stable=True)
    out = torch.empty_like(flat)
    # The unit of rank k gets the value of rank n - 1 - k.
    out[order] = flat[order].flip(0)
    return out.view(score.shape)
