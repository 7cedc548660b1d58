"""What the checks are written with: comparisons that name what differs, and changes to models."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.types import Group


def require(holds: bool, message: str) -> None:
    """Assert, also under ``python -O``.

    Raises:
        AssertionError: with the message.
    """
    if not holds:
        raise AssertionError(message)


def expect_same(
    expected: Mapping[str, object], found: Mapping[str, object], *, exact: bool = False, tolerance: float = 1e-4
) -> None:
    """Compare tensors by name: bit for bit, or relative to the largest value of each.

    Raises:
        AssertionError: names the tensor and the largest difference.
    """
    require(set(expected) == set(found), f"{set(expected)} is not {set(found)}")
    for name, value in expected.items():
        other = found[name]
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            require(value is other or value == other, f"{name} changed")
        elif exact or not value.is_floating_point():
            require(torch.equal(value, other), f"{name} differs")
        else:
            require(value.shape == other.shape, f"{name}: {tuple(other.shape)} is not {tuple(value.shape)}")
            scale = max(float(value.abs().max()), 1e-12) if value.numel() else 1.0
            gap = float((value - other).abs().max()) if value.numel() else 0.0
            require(gap <= tolerance * scale, f"{name} differs by {gap:g} of {scale:g}")


def expect_error(kind: type[Exception], action: Callable[[], object], word: str) -> None:
    """The action must raise this error, with the word in its message.

    Raises:
        AssertionError: no error, or without the word.
    """
    try:
        action()
    except kind as error:
        require(word in str(error), f"the message does not say {word!r}: {error}")
        return
    raise AssertionError(f"no {kind.__name__}")


def reorder_units(model: nn.Module, group: Group, order: Tensor) -> None:
    """Give unit i the place of unit order[i], in every tensor; spans vary along one dimension."""
    tensors = model.state_dict(keep_vars=True)
    for span in group.spans:
        if span.index is not None:
            dim = max(range(span.index.dim()), key=span.index.shape.__getitem__)
            tensors[span.tensor].data = tensors[span.tensor].data.index_select(dim, order)


def erase_unit(model: nn.Module, group: Group, *, unit: int) -> None:
    """Write zeros to every weight of a unit."""
    for span in group.spans:
        if span.role != "state":
            data = model.get_parameter(span.tensor).data
            data.masked_fill_(span.units(data) == unit, 0.0)


def mark(model: nn.Module, *, freeze: bool = False) -> None:
    """Put the model into a state that a careless criterion would lose."""
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
        parameter.requires_grad_(not freeze or i % 3 != 0)
    next(model.children()).register_forward_hook(lambda *_: None)


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that a criterion must leave as it was, by name."""
    state: dict[str, object] = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {f"grad of {n}": copy_of(p.grad) for n, p in model.named_parameters()}
    state |= {f"requires_grad of {n}": p.requires_grad for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
        state[f"hooks of {name}"] = list(module._forward_hooks)
    return state


def copy_of(tensor: Tensor | None) -> Tensor | None:
    """A copy, or None."""
    return None if tensor is None else tensor.clone()
