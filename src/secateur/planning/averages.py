"""Averaged weights follow a cut: an `AveragedModel`, a plain copy, or a mapping of names to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from secateur.errors import InputError, PlanMismatchError, RecipeError
from secateur.kinds.layers.drop import Layers, new_names
from secateur.kinds.slices.fold import Scale, rescale
from secateur.model.tensors import cut_tensor
from secateur.types import Cuts

Averages = nn.Module | MutableMapping[str, Tensor]
"""An `AveragedModel`, a copy of the model that is averaged into, or averages by the names of the weights."""


def averaged_module(averages: object) -> nn.Module | None:
    """The module that holds the averages, out of the one that does the averaging; None for a mapping.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> averaged_module(net) is net, averaged_module({"weight": net.weight}) is None
        (True, True)
    """
    inner = getattr(averages, "module", None)
    if isinstance(inner, nn.Module):
        return inner
    return averages if isinstance(averages, nn.Module) else None


def require_averages(model: nn.Module, averages: object) -> None:
    """Refuse what cannot follow a model, before anything long starts.

    Raises:
        RecipeError: neither a module nor a mapping.
        InputError: it holds no average of any weight of the model.
    """
    if averages is None:
        return
    inner = averaged_module(averages)
    known = averages if inner is None else dict(inner.named_parameters())
    if not isinstance(known, Mapping):
        raise _no_averages(averages)
    if not any(name in known for name, _ in model.named_parameters()):
        raise InputError(
            "ema holds no average of any weight of the model",
            why="no name in it is that of a parameter",
            hint="build it from this model; names are those of model.named_parameters()",
        )


def _no_averages(averages: object) -> RecipeError:
    return RecipeError(
        f"ema is a {type(averages).__name__}.",
        hint="Pass an AveragedModel, a copy of the model that is averaged into, or a dict of names to tensors.",
    )


def averages_after(
    model: nn.Module, averages: Mapping[str, Tensor], cuts: Cuts, layers: Layers, masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a mapping of averaged weights becomes; nothing is changed.

    Args:
        model: before the removal.
        averages: parameter or buffer name -> average, of the model's shapes; other keys (a step count) are kept.
        cuts: tensor name -> dimension -> kept indices.
        layers: container path -> {"size", "removed", "lists"}.
        masks: parameter name -> bool, True = keep.

    Raises:
        PlanMismatchError: an average has another shape than its tensor.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    first = {id(tensor): name for name, tensor in reversed([*model.named_parameters(), *model.named_buffers()])}
    names = new_names(model, layers)
    result: dict[str, Tensor] = {}
    for name, average in averages.items():
        if name not in tensors:
            result[name] = average
            continue
        tensor = tensors[name]
        if not isinstance(average, Tensor) or average.shape != tensor.shape:
            raise PlanMismatchError(
                f"The average of {name!r} has not the shape {tuple(tensor.shape)} of its weight.",
                hint="Pass the averages of this model, from before the cut.",
            )
        known = first[id(tensor)]
        kept = cut_tensor(average, cuts.get(known, {})).to(average.dtype)
        if known in masks:
            kept = torch.where(masks[known].to(kept.device), kept, torch.zeros_like(kept))
        renamed = names(name)
        if renamed is not None:
            result[renamed] = kept
    return result


def migration(
    model: nn.Module,
    averages: object,
    replay: Callable[[nn.Module], None],
    *,
    cuts: Cuts,
    layers: Layers,
    masks: Mapping[str, Tensor],
    scales: Sequence[Scale] = (),
) -> Callable[[], None]:
    """Check that averages can follow, and return the function that makes them follow.

    Raises:
        RecipeError: neither a module nor a mapping.
        PlanMismatchError: they belong to another model, or were cut already.
    """
    inner = averaged_module(averages)
    if inner is not None:
        theirs = {name: tensor.shape for name, tensor in inner.named_parameters()}
        if theirs != {name: tensor.shape for name, tensor in model.named_parameters()}:
            raise PlanMismatchError("The averaged model has other parameters than the model.")
        return lambda: replay(inner)
    if not isinstance(averages, MutableMapping):
        raise _no_averages(averages)
    new = averages_after(model, averages, cuts, layers, masks)
    after = new_names(model, layers)
    held = {scale.tensor: new[name] for scale in scales if (name := after(scale.tensor)) in new}
    rescale(held, scales, cuts)

    def swap() -> None:
        averages.clear()
        averages.update(new)

    return swap
