"""Hooks that hold a weight by themselves: a copy of the model must not go on reading that of the original."""

from __future__ import annotations

from collections.abc import Iterator
from types import CellType

from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.model.reach import FUNCTIONS, inside

DEEPEST = 4  # functions and containers that hold each other


def require_own_hooks(model: nn.Module, result: nn.Module) -> None:
    """Refuse a copy with a hook whose function still holds a weight of the original (see `rebound`).

    Args:
        model: the original.
        result: its copy.

    Raises:
        UnsupportedError: names the module of the hook, and the weight.
    """
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    for path, module in result.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            name = next((names[id(t)] for t in _tensors(hook, DEEPEST) if id(t) in names), None)
            if name is not None:
                raise UnsupportedError(
                    f"A hook of {path or type(model).__name__!r} holds the weight {name!r} of the model.",
                    why="copies share the functions of hooks, so that the smaller model would read the original's",
                    hint="Let the hook take the weight from the module that it is handed (module.weight), or cut the "
                    "model itself: inplace=True.",
                )


def _tensors(value: object, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or isinstance(value, nn.Module):
        return
    elif isinstance(value, CellType):
        try:
            yield from _tensors(value.cell_contents, depth)
        except ValueError:  # a variable that is not bound yet
            return
    elif isinstance(value, FUNCTIONS):
        for part in inside(value):
            yield from _tensors(part, depth - 1)
    elif isinstance(value, (list, tuple, set, dict)):
        for part in list(value.values()) if isinstance(value, dict) else list(value):
            yield from _tensors(part, depth - 1)
