"""From decisions about units to masks of tensors, and what is refused about a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from secateur.errors import InputError
from secateur.model.tensors import named_tensors
from secateur.registry import suggestion
from secateur.types import Group

Masks = Mapping[str, Tensor]


def expand(groups: Sequence[Group], keep: Masks, *, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Turn decisions about units into masks of tensors.

    Args:
        groups: the groups that were selected from.
        keep: group name -> bool tensor of the group's shape, True = keep. Groups that are left out stay.
        model: gives the masks the full shape of their tensors (as views). Without it dimensions that
            no unit depends on have size 1; `mask_model` takes both.

    Returns:
        tensor name -> bool tensor, True = keep. An element stays if every unit that owns it stays. Spans of
        role "state" (running statistics) are left out: they are cut, not masked.

    Raises:
        InputError: an unknown group or tensor, or a decision of another shape or dtype.

    Example:
        >>> from secateur.types import Span
        >>> rows = Group("rows", "vector", (2,), (Span("w", torch.tensor([[0], [1]]), "self"),))
        >>> expand([rows], {"rows": torch.tensor([True, False])})["w"].tolist()
        [[True], [False]]
    """
    known = {group.name: group for group in groups}
    tensors = None if model is None else named_tensors(model)  # buffers too: the spans of a group may lie in them
    masks: dict[str, Tensor] = {}
    for name, kept in keep.items():
        if name not in known:
            raise InputError(f"no group is called {name!r}", hint=suggestion(name, known))
        check(name, kept, known[name].shape, exact=True)
        for span in known[name].spans:
            if span.role == "state":
                continue
            mask = kept if span.index is None else _look_up(kept.flatten(), span.index.to(kept.device))
            masks[span.tensor] = masks[span.tensor] & mask if span.tensor in masks else mask
    if tensors is None:
        return masks
    for name in masks:
        if name not in tensors:
            raise InputError(f"the model has no tensor {name!r}", hint=suggestion(name, tensors))
    return {name: mask.expand(tensors[name].shape) for name, mask in masks.items()}


def _look_up(kept: Tensor, index: Tensor) -> Tensor:
    # Elements that nobody owns (-1) find the True that is appended.
    return torch.cat([kept, kept.new_ones(1)])[torch.where(index < 0, kept.numel(), index)]


def resolve(model: nn.Module, masks: Masks) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Parameters and their masks under the first name of each; several masks of a tied parameter become one.

    Nothing is copied where one mask is given for a parameter and lies on its device.

    Raises:
        InputError: an unknown name, or a mask of wrong shape or dtype.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    first = first_names(model)
    found: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for alias, mask in masks.items():
        if alias not in named:
            raise InputError(f"the model has no parameter {alias!r}", hint=suggestion(alias, named))
        parameter = named[alias]
        if isinstance(parameter, UninitializedParameter):
            raise InputError(f"{alias!r} has no shape yet", hint="run one forward pass before masking")
        check(alias, mask, tuple(parameter.shape))
        name, own = first[alias], mask.detach().to(parameter.device)
        # Under either name it is the same tensor, so what one mask removes the other cannot keep.
        found[name] = (parameter, found[name][1] & own if name in found else own)
    return found


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the first name of that parameter; others only where it is tied."""
    first: dict[int, str] = {}
    # By identity and not by memory: a view of a parameter is another parameter to every optimizer.
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def check(name: str, mask: object, shape: tuple[int, ...], *, exact: bool = False) -> None:
    """Refuse a mask that is no bool tensor of a shape; unless `exact`, sizes of 1 stand for any size."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InputError(f"the mask of {name!r} is not a bool tensor", hint="True = keep, False = remove")
    fits = mask.dim() == len(shape) and all(m in (s, s if exact else 1) for m, s in zip(mask.shape, shape, strict=True))
    if not fits:
        raise InputError(
            f"the mask of {name!r} has shape {tuple(mask.shape)}, not {tuple(shape)}",
            hint="" if exact else "decisions about larger units than elements: pass groups=, what they were made for",
        )
