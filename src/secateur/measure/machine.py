"""The machine that a time was measured on: no figure means anything without it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TypedDict

import torch


class Surroundings(TypedDict):
    """What stands beside a measured time."""

    cpu: str
    isa: str
    cores: int
    threads: int
    torch: str


def machine() -> Surroundings:
    """Name the processor, the instruction set that PyTorch uses on it, its cores and threads, and PyTorch.

    Example:
        >>> machine()["threads"] == torch.get_num_threads()
        True
    """
    return {
        "cpu": processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The name of the processor as the system says it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # `platform.processor` is empty or only says "x86_64" on Linux.
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    # Those that this process may use, which a container or an affinity makes fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ticks() -> tuple[int, int]:
    """Ticks of all processors since the start, and those of them that other virtual machines took; zeros elsewhere."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return 0, 0
    counts = [int(each) for each in first]
    return sum(counts[:8]), counts[7] if len(counts) > 7 else 0
