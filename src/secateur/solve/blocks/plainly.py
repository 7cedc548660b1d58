"""A model as it must stand while its blocks run by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """In eval mode, without caches of keys and values, experts one by one, and products in full precision.

    Grouped kernels of experts hide what they multiply. Second moments and solvers cannot do with the ten bits of TF32.
    """
    with ExitStack() as stack:
        for one in _configs(model):
            if getattr(one, "use_cache", None):
                stack.callback(setattr, one, "use_cache", one.use_cache)
                one.use_cache = False
            before = getattr(one, "_experts_implementation_internal", None)
            if before not in (None, "eager"):
                stack.callback(setattr, one, "_experts_implementation_internal", before)
                one._experts_implementation_internal = "eager"
        was = model.training
        model.eval()
        stack.callback(model.train, was)
        precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        yield


def _configs(model: nn.Module) -> list[Any]:
    """The configs that modules hold, and those inside of them: encoders and decoders may have copies of their own."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if config is None or not hasattr(config, "__dict__"):
            continue
        inner = [value for value in vars(config).values() if type(value).__name__.endswith("Config")]
        found.update({id(one): one for one in (config, *inner)})
    return list(found.values())
