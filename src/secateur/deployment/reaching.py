"""What reaches the layers of a model, and what stands where in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.model.call import call
from secateur.model.guard import evaluating
from secateur.types import Example


def shapes_reaching(
    model: nn.Module, layers: Mapping[str, nn.Module], examples: Sequence[Example]
) -> dict[str, list[torch.Size]]:
    """Shapes of the first inputs of some layers, in the order of their calls; empty inputs do not count.

    Args:
        model: runs on every example, and is left as it is.
        layers: name -> module of it.
        examples: what forwards take.
    """
    found: dict[str, list[torch.Size]] = {name: [] for name in layers}
    handles = [layer.register_forward_pre_hook(_recorder(found[name])) for name, layer in layers.items()]
    try:
        for example in examples:
            with evaluating(model, example=example):
                call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


Places = dict[int, list[tuple[str, nn.Module]]]


def places_of(model: nn.Module) -> Places:
    """By id: in which modules a parameter or buffer is, and under which names a module stands.

    A module that stands in two places would be exchanged in one of them only, and a tensor that two modules have is
    theirs together.
    """
    found: Places = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for each in (module, *module._parameters.values(), *module._buffers.values()):
            if each is not None:
                found.setdefault(id(each), []).append((name, module))
    return found


def is_hooked(module: nn.Module) -> bool:
    """Whether code of others runs before or after the forward of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _recorder(kept: list[torch.Size]) -> Callable[[nn.Module, tuple[object, ...]], None]:
    def record(layer: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel():
            kept.append(args[0].shape)

    return record
