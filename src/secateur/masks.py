"""Reversible zeros: masks per parameter, written in place, taken back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.model.tensors import named_tensors
from secateur.registry import suggestion
from secateur.types import Group, Kept

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
    tensors = None if model is None else named_tensors(model)
    masks: dict[str, Tensor] = {}
    for name, kept in keep.items():
        if name not in known:
            raise InputError(f"no group is called {name!r}", hint=suggestion(name, known))
        _check(name, kept, known[name].shape, exact=True)
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


@dataclass(eq=False)
class MaskHandle:
    """What was masked, and the way back.

    Args:
        masks: parameter name -> bool tensor of its shape, True = keep.

    Used as a context manager it removes the masks on exit.
    """

    masks: dict[str, Tensor]
    _parameters: dict[str, Tensor]
    _originals: dict[str, Tensor]

    def enforce(self) -> None:
        """Write the zeros again, after an optimiser step has changed the weights."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.masked_fill_(~self.masks[name], 0.0)

    def remove(self) -> None:
        """Put back the original bits of every masked element; kept elements stay as they are now.

        Calling it again does nothing.
        """
        with torch.no_grad():
            for name, values in self._originals.items():
                self._parameters[name][~self.masks[name]] = values
        self._originals.clear()

    def __enter__(self) -> MaskHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def mask_model(model: nn.Module, masks: Masks) -> MaskHandle:
    """Write +0.0 where a mask is False, in place, until the handle's ``remove()``.

    Parameters keep their identity, so optimisers and hooks hold; a tied parameter is masked once, under any
    of its names. Expect no speed from it: dense kernels multiply zeros like other numbers. Masks put on top
    of each other are removed in reverse order.

    Args:
        model: changed in place.
        masks: parameter name -> bool tensor of its shape (or of size 1 in dimensions where all entries are
            equal), True = keep; or what `select` made of `score`, for units of any granularity.

    Returns:
        A handle with ``remove()`` (back to the original bits) and ``enforce()`` (zeros once more).

    Raises:
        InputError: an unknown name, or a mask of wrong shape or dtype; the model is unchanged then.

    Cost:
        One pass over the masked parameters; stores the masks and the values that they hide.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with mask_model(layer, {"weight": torch.tensor([[True, False]])}):
        ...     layer.weight[0, 1].item()
        0.0
    """
    if isinstance(masks, Kept) and masks.groups:  # decisions about units, of any granularity
        masks = expand(masks.groups, masks, model=model)
    parameters, full = _resolve(model, masks)
    originals = {name: p.detach()[~full[name]] for name, p in parameters.items()}
    handle = MaskHandle(full, parameters, originals)
    handle.enforce()
    return handle


@dataclass(frozen=True)
class Sparsity:
    """Counted zeros.

    Args:
        elements: elements of the counted parameters.
        masked: elements that the masks leave out.
        zeros: elements that are zero now.
    """

    elements: int
    masked: int
    zeros: int

    @property
    def fraction(self) -> float:
        """Fraction that the masks leave out, in [0, 1]."""
        return self.masked / self.elements if self.elements else 0.0


def sparsity_of(model: nn.Module, masks: Masks) -> Sparsity:
    """Count what the masks leave out and what is zero, over the masked parameters together.

    Raises:
        InputError: as `mask_model`.
    """
    parameters, full = _resolve(model, masks)
    masked = sum(int((~mask).sum()) for mask in full.values())
    zeros = sum(int((parameter.detach() == 0).sum()) for parameter in parameters.values())
    return Sparsity(sum(parameter.numel() for parameter in parameters.values()), masked, zeros)


def _resolve(model: nn.Module, masks: Masks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and full masks under first names; raises before anything is changed."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters: dict[str, Tensor] = {}
    full: dict[str, Tensor] = {}
    for alias, mask in masks.items():
        if alias not in named:
            raise InputError(f"the model has no parameter {alias!r}", hint=suggestion(alias, named))
        parameter = named[alias]
        _check(alias, mask, tuple(parameter.shape))
        name = first[id(parameter)]
        whole = mask.to(parameter.device).expand(parameter.shape)
        parameters[name] = parameter
        full[name] = full[name] & whole if name in full else whole.contiguous().clone()
    return parameters, full


def _check(name: str, mask: Tensor, shape: tuple[int, ...], *, exact: bool = False) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InputError(f"the mask of {name!r} is not a bool tensor", hint="True = keep, False = remove")
    fits = mask.dim() == len(shape) and all(m in (s, s if exact else 1) for m, s in zip(mask.shape, shape, strict=True))
    if not fits:
        raise InputError(f"the mask of {name!r} has shape {tuple(mask.shape)}, not {tuple(shape)}")
