"""Whether there is room for what is about to be gathered: asked before the work, not by the allocator in its middle."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from secateur.errors import ResourceError

MEMORY = Path("/proc/meminfo")


def require_room(what: str, wanted: int, device: torch.device, *, hint: str) -> None:
    """Refuse what would not fit into the memory that is free.

    Args:
        what: is to be gathered, as the beginning of a sentence.
        wanted: bytes, an estimate from below.
        device: where it will lie.
        hint: how to need less.

    Raises:
        ResourceError: it is more than what is free; says both figures.
    """
    free = free_bytes(device)
    if free is not None and wanted > free:
        raise ResourceError(
            f"{what} would take at least {_giga(wanted)} of memory, and {_giga(free)} are free", hint=hint
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that a program could still get; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if MEMORY.exists():
        # Free and what caches would give back: pages that are merely free are few on a machine that has run for long.
        lines = (line.split() for line in MEMORY.read_text("ascii").splitlines())
        return next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), None)
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    return None


def _giga(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
