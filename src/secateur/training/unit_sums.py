"""Sums over the units of a group, of tensors that carry gradients or hold them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.types import Group, Span


def unit_sums(values: Mapping[str, Tensor], group: Group, roles: frozenset[str]) -> Tensor:
    """Sum of element values per unit; differentiable, in the dtype of the values.

    Args:
        values: tensor name -> value of every element.
        group: the units.
        roles: of the spans that count.

    Returns:
        tensor of ``group.shape``.
    """
    total: Tensor | None = None
    for span in group.spans:
        if span.role not in roles or span.tensor not in values:
            continue
        part = _of_span(values[span.tensor], span, group.size)
        total = part if total is None else total + part
    assert total is not None
    return total.view(group.shape)


def _of_span(value: Tensor, span: Span, units: int) -> Tensor:
    if span.index is None:
        return value.flatten()
    index = span.index.to(value.device)
    whole = [d for d in range(value.dim()) if index.shape[d] == 1 and value.shape[d] != 1]
    if whole:
        value = value.sum(whole, keepdim=True)
    # -1, no unit, lands behind the last one.
    flat = torch.where(index < 0, units, index).expand(value.shape).flatten()
    return value.new_zeros(units + 1).index_add(0, flat, value.flatten())[:units]


def per_element(units: Tensor, span: Span, shape: torch.Size) -> Tensor:
    """The value of the unit that owns every element; 1 where none does. Broadcasts to the shape of the tensor."""
    if span.index is None:
        return units.view(shape)
    padded = torch.cat([units.flatten(), units.new_ones(1)])
    return padded[span.index.to(units.device)]


def unit_sizes(group: Group, shapes: Mapping[str, torch.Size], roles: frozenset[str]) -> Tensor:
    """How many elements every unit has, float32."""
    return unit_sums({name: torch.ones(shape) for name, shape in shapes.items()}, group, roles)
