"""Models that come masked by torch: read their masks, and make ordinary zeros with one owner of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from secateur.errors import UnsupportedError
from secateur.masks.handle import MaskHandle, mask_model
from secateur.model.admit import admit
from secateur.model.carried import (
    PRUNE,
    CarriedMask,
    carried_masks,
    is_binary,
    is_mask,
    original_of,
    own_class,
    parametrizations,
)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that a model carries from `torch.nn.utils.prune` or `torch.nn.utils.parametrize`.

    Args:
        model: left as it is.

    Returns:
        parameter name as in the model without masks ("0.weight") -> bool tensor of its shape, True = keep. Empty
        where the model carries none.

    Raises:
        UnsupportedError: a mask with values between 0 and 1, a method that does more than multiply, or a tensor that
            is tied to one that is masked otherwise; none of these is a mask of a parameter.

    Cost:
        One pass over the masked weights.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(4, 1), "weight", amount=3)
        >>> int(masks_of(layer)["weight"].sum())
        1
    """
    return {found.name: found.keep for found in _found(model)}


def import_masks(model: nn.Module, *, inplace: bool = True, keep_originals: bool = True) -> MaskHandle:
    """Turn masks that torch multiplies in every forward pass into zeros in ordinary parameters, and own them.

    Both interfaces are read: `torch.nn.utils.prune` (``weight_orig``, ``weight_mask``) and masks by
    `torch.nn.utils.parametrize`, as `torch.ao.pruning` makes them. The model computes the same afterwards, its
    state has the names of the model without masks, and whatever takes a model (score, plan, prune, an export) sees
    the zeros. Parameters keep their identity, so an optimizer goes on: ``handle.hold(optimizer)``.

    Args:
        model: changed in place, unless `inplace` is False.
        inplace: False leaves the model as it is and works on a copy, ``handle.model``.
        keep_originals: the handle stores the values under the masks, so that ``handle.remove()`` puts them back.

    Returns:
        The owner of the masks; without masks in the model it owns none.

    Raises:
        UnsupportedError: as `masks_of`; the model is unchanged then.

    Cost:
        As `mask_model`, and a copy of the model where it is not changed in place.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(4, 1), "weight", amount=3)
        >>> handle = import_masks(layer)
        >>> int((layer.weight == 0).sum()), sorted(layer.state_dict())
        (3, ['bias', 'weight'])
    """
    model = admit(model, prepared=True)
    target = model if inplace else _copy(model)
    masks = _found(target)  # all are read and checked before the first is taken away
    for found in masks:
        _make_plain(found)
    return mask_model(target, {found.name: found.keep for found in masks}, keep_originals=keep_originals)


@dataclass(frozen=True, eq=False)
class _Found:
    """A carried mask that was understood: where it is, the hidden parameter, and bool [its shape], True = keep."""

    where: CarriedMask
    original: nn.Parameter
    keep: Tensor

    @property
    def name(self) -> str:
        """Qualified name without the mask."""
        return self.where.name

    @property
    def place(self) -> tuple[int, str]:
        """The module (by id) and the name under which the hidden parameter is registered."""
        module, name = self.where.module, self.where.attribute
        if self.where.by == PRUNE:
            return id(module), f"{name}_orig"
        return id(parametrizations(module)[name]), "original"


def _found(model: nn.Module) -> list[_Found]:
    found = [_prune_mask(c) if c.by == PRUNE else _parametrized_mask(c) for c in carried_masks(model)]
    _require_untied(model, found)
    return found


def _prune_mask(carried: CarriedMask) -> _Found:
    module, name = carried.module, carried.attribute
    method = module._forward_pre_hooks[_hook_of(module, name)]
    mask, original = module._buffers.get(f"{name}_mask"), module._parameters.get(f"{name}_orig")
    # Methods may choose the mask as they like. One that applies it in its own way computes something else than zeros.
    if mask is None or original is None or type(method).apply_mask is not BasePruningMethod.apply_mask:  # type: ignore[attr-defined]
        raise _not_a_mask(carried, f"{type(method).__name__} does more than multiply by a mask")
    if not is_binary(mask):
        raise _not_a_mask(carried, "its mask holds other values than 0 and 1")
    return _Found(carried, original, mask != 0)


def _parametrized_mask(carried: CarriedMask) -> _Found:
    steps = parametrizations(carried.module)[carried.attribute]
    original = original_of(steps)
    if original is None:
        raise _not_a_mask(carried, "it is parametrized in terms of several tensors, or of a buffer")
    other = [type(step).__name__ for step in steps if not is_mask(step, original)]
    if other:
        raise _not_a_mask(carried, f"it is parametrized by {other[0]} too")
    with torch.no_grad():
        # Ones come out as the mask, whether it is written down by elements or by rows, or as several masks.
        keep = _through(steps, torch.ones_like(original))
        masked = _through(steps, original.detach())
    if not is_binary(keep) or keep.shape != original.shape or not torch.equal(masked, keep * original.detach()):
        raise _not_a_mask(carried, f"{type(steps[0]).__name__} does more than multiply by a mask")
    return _Found(carried, original, keep != 0)


def _through(steps: parametrize.ParametrizationList, value: Tensor) -> Tensor:
    for step in steps:
        value = step(value)
    return value


def _not_a_mask(carried: CarriedMask, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"the mask of {carried.name!r} cannot be imported",
        why=why,
        hint="make its weight permanent first: torch.nn.utils.prune.remove, or parametrize.remove_parametrizations",
    )


def _require_untied(model: nn.Module, found: Sequence[_Found]) -> None:
    """Refuse hidden parameters that something else uses without the mask, or under another one."""
    first: dict[int, _Found] = {}
    for f in found:
        other = first.setdefault(id(f.original), f)
        if not torch.equal(other.keep, f.keep):
            raise UnsupportedError(
                f"{other.name!r} and {f.name!r} are one tensor under two masks", hint="untie them first"
            )
    known = {f.place for f in found}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in first and (id(module), name) not in known:
                raise UnsupportedError(
                    f"{first[id(parameter)].name!r} is tied to {f'{path}.{name}'.lstrip('.')!r}, which is not masked",
                    hint="untie them, or mask both alike",
                )


def _make_plain(found: _Found) -> None:
    """Take the hook or the parametrization away; the hidden parameter stands under its own name again."""
    module, name = found.where.module, found.where.attribute
    if found.where.by != PRUNE:
        own_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        return
    del module._forward_pre_hooks[_hook_of(module, name)]
    del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
    # By the module itself: it takes the product of the last forward pass away, and recurrent layers follow.
    setattr(module, name, found.original)


def _hook_of(module: nn.Module, name: str) -> int:
    hooks = module._forward_pre_hooks.items()
    return next(key for key, hook in hooks if isinstance(hook, BasePruningMethod) and hook._tensor_name == name)


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; results that hang in modules (the product of the last forward pass) are copied as values."""
    memo: dict[int, object] = {}
    for carried in carried_masks(model):
        product = carried.module.__dict__.get(carried.attribute)
        if isinstance(product, Tensor) and not product.is_leaf:  # torch refuses to copy what has a history
            memo[id(product)] = product.detach().clone()
    return copy.deepcopy(model, memo)
