"""Small questions about steps and values that `meanings` asks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from secateur.kinds.slices.extents import Extent
from secateur.kinds.slices.narrow import Narrow, spread_out
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Step, numbers_in

POSITIONS = ("arange", "range")  # of which the number is the size
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def scalars_of(step: Step) -> set[str]:
    """Arguments that are numbers by their nature: neither sizes, nor places, nor dimensions."""
    if base_name(step.func) in POSITIONS:
        return set()
    return {a.name for a in step.func._schema.arguments if str(a.type) in ("number", "Optional[number]")}


def inputs_of(step: Step) -> list[int]:
    """Numbers of the tensors that a step is given, each once."""
    return list(dict.fromkeys([*numbers_in(step.args), *numbers_in(step.kwargs)]))


def grow_alike(extents: Iterable[Extent]) -> Extent | None:
    """The extent of what is added up or chosen from: all have to grow alike."""
    found = list(extents)
    return Extent() if not found else found[0] if all(e.like(found[0]) for e in found) else None


def is_uniform(tensor: Tensor) -> bool:
    """Whether all elements are one number."""
    return tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def lives(value: Tensor | Narrow) -> bool:
    """Whether anything in a value is there and not zero."""
    tensor = value.small if isinstance(value, Narrow) and value.is_small else spread_out(value)
    return tensor.numel() > 0 and bool(torch.nan_to_num(tensor).any())


def is_same(one: Tensor | Narrow, two: Tensor | Narrow) -> bool:
    """Whether two values are one up to rounding, where both are finite."""
    if isinstance(one, Narrow) and isinstance(two, Narrow) and one.is_small and one.fits(two):
        return is_same(one.small, two.small)
    a, b = spread_out(one), spread_out(two)
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return a.shape == b.shape and torch.equal(a, b)
    if not a.numel():
        return True
    a, b = (torch.where(torch.isnan(t) | torch.isinf(t), 0, t) for t in (a, b))
    return float((a - b).abs().max()) <= SAME.get(a.dtype, 1e-4) * float(b.abs().max())
