"""Several processes that prune one model: each takes its share of the batches, and all solve from the same sums."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.solve.blocks.products import WHOLE, MatrixSite
from secateur.solve.blocks.settings import Settings
from secateur.solve.blocks.sums import GramSums


def mine(count: int, settings: Settings, sites: Iterable[MatrixSite]) -> list[int]:
    """Numbers of the batches that this process takes; all of them where it works alone.

    Args:
        count: of all batches, which every process was given.
        settings: whether processes work together.
        sites: what is to be solved.

    Raises:
        RecipeError: no group of processes, or options that need all batches in one process.
        InputError: fewer batches than processes.
        UnsupportedError: experts, which the batches of one process may all pass by while another waits for them.
    """
    if not settings.together:
        return list(range(count))
    if not (dist.is_available() and dist.is_initialized()):
        raise RecipeError(
            "blocks.together needs a group of processes, and there is none.",
            hint='start by torchrun, and call torch.distributed.init_process_group("gloo") first',
        )
    clash = [name for name in ("reconstruct", "allocation", "checkpoint") if getattr(settings, name) is not None]
    if clash:
        raise RecipeError(f"blocks.together and blocks.{clash[0]} do not go together.", hint="leave one of them out")
    if any(part != WHOLE for _, part in sites):
        raise UnsupportedError("experts are not pruned by several processes together", hint="use one process")
    world = dist.get_world_size()
    if count < world:
        raise InputError(f"there are {count} batches for {world} processes", hint="smaller batches, or more of them")
    return list(range(dist.get_rank(), count, world))


def summed(sums: GramSums, *, together: bool) -> GramSums:
    """The sums of all processes."""
    if not together:
        return sums
    tokens = torch.tensor(sums.tokens, device=sums.gram.device)
    # In this order everywhere: processes wait for each other at every call.
    for tensor in (sums.gram, sums.cross, tokens):
        if tensor is not None:
            dist.all_reduce(tensor)
    return GramSums(sums.gram, sums.cross, int(tokens))
