"""Masks that a model carries with it: weights that torch recomputes from a hidden parameter in every forward pass.

`torch.nn.utils.prune` renames a parameter to ``weight_orig``, keeps a buffer ``weight_mask`` and multiplies them in a
hook before the forward. `torch.nn.utils.parametrize`, on which `torch.ao.pruning` stands, keeps the parameter as
``parametrizations.weight.original`` and multiplies when the attribute is read. Either way the parameter that can be
seen has no zeros, and the zeros that count are no parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from secateur.errors import UnsupportedError
from secateur.model.modules import named_modules

PRUNE, PARAMETRIZE = "torch.nn.utils.prune", "torch.nn.utils.parametrize"


@dataclass(frozen=True, eq=False)
class CarriedMask:
    """One tensor of a module that is masked in every forward pass.

    Args:
        name: its qualified name without the mask, "0.weight".
        module: the module.
        attribute: its name there, "weight".
        by: which of the two interfaces of torch masks it.
    """

    name: str
    module: nn.Module
    attribute: str
    by: str


def carried_masks(model: nn.Module) -> Iterator[CarriedMask]:
    """All masked tensors of a model, module by module; a module that occurs twice comes once."""
    # By what is there and not by names: parameters that end in _orig are nobody's mask.
    for path, module in named_modules(model):
        prefix = f"{path}." if path else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                yield CarriedMask(prefix + name, module, name, PRUNE)
        if parametrize.is_parametrized(module):
            for name, steps in parametrizations(module).items():
                if any(is_mask(step, original_of(steps)) for step in steps):
                    yield CarriedMask(prefix + name, module, name, PARAMETRIZE)


def refuse_carried_masks(model: nn.Module) -> None:
    """Refuse a model that carries masks: its hidden parameters would be scored as if nothing were masked.

    Raises:
        UnsupportedError: names the tensor, and the function that makes ordinary zeros of such masks.
    """
    first = next(carried_masks(model), None)
    if first is not None:
        raise UnsupportedError(
            f"{first.name!r} is masked by {first.by}",
            why="its weight is computed anew in every forward pass, from a hidden parameter without the zeros",
            hint="call secateur.import_masks(model) first: the masks become ordinary zeros, and a handle holds them",
        )


def parametrizations(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Attribute -> the steps that compute it, of a module that has some."""
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return {name: steps for name, steps in found.items() if isinstance(steps, parametrize.ParametrizationList)}


def original_of(steps: parametrize.ParametrizationList) -> nn.Parameter | None:
    """The parameter that the steps start from; None where it is a buffer, or several tensors."""
    original = getattr(steps, "original", None)
    return original if isinstance(original, nn.Parameter) else None


def is_mask(step: nn.Module, hidden: Tensor | None) -> bool:
    """Whether a parametrization is a mask: no parameters, one buffer of 0 and 1, and a product with 0 and 1.

    Args:
        step: the parametrization.
        hidden: the tensor that it masks. Where it is not known, the buffer alone decides.
    """
    # Spectral norm keeps two vectors, weight norm has parameters: both are asked no further.
    buffers = list(step.buffers())
    if len(buffers) != 1 or next(step.parameters(), None) is not None or not is_binary(buffers[0]):
        return False
    if hidden is None:
        return True
    # Only the function tells how it uses its buffer: an orthogonal weight that starts as the identity has one of
    # zeros and ones as well.
    with torch.no_grad():
        once, twice = step(torch.ones_like(hidden)), step(torch.full_like(hidden, 2.0))
    return isinstance(once, Tensor) and once.shape == hidden.shape and is_binary(once) and torch.equal(twice, 2 * once)


def is_binary(mask: Tensor) -> bool:
    """Whether all entries are 0 or 1, or False or True; an empty tensor is no mask."""
    if mask.dtype == torch.bool:
        return mask.numel() > 0
    return mask.numel() > 0 and bool(((mask == 0) | (mask == 1)).all())


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no copy of it shares.

    torch computes the weight in a property of a class made for the module, and takes the property off that class.
    Copies share the class, so those that keep their masks would lose their weight.
    """
    shared = type(module)
    body = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, body)
