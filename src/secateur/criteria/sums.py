"""Values of single elements, reduced to one value per unit over the spans of a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.types import Group, Span

Reduction = Literal["sum", "mean", "max"]

CHUNK = 65_536  # elements that are squared at a time

TINY = 1e-15  # below it the squares of float32 numbers begin to vanish


def counts(role: str, roles: frozenset[str] | None) -> bool:
    """Whether spans of a role count; None stands for all but "state"."""
    return role != "state" if roles is None else role in roles


def reduce_spans(
    values: Mapping[str, Tensor],
    group: Group,
    how: Reduction = "sum",
    *,
    roles: frozenset[str] | None = None,
    squared: bool = False,
) -> Tensor:
    """Reduce element values to one value per unit.

    Args:
        values: tensor name -> value of each element, of the tensor's shape. Spans of tensors that are not
            in here do not count.
        group: the units and where they live.
        how: "sum", "mean" over the counted elements of the unit, or "max". A unit without any gets 0.
        roles: roles of the spans that count; None stands for all but "state".
        squared: reduce the squares of the values (sum or mean), which are never stored.

    Returns:
        Tensor of ``group.shape`` on the device of the values: float64, or for granularity element (a span
        without index) the values as they are.

    Raises:
        InputError: no span of the group counts.

    Cost:
        One pass over the counted elements; nothing of the size of a tensor is allocated for channels.
    """
    return Sums(values, how, squared=squared).of(group, roles)


class Sums:
    """Element values, reduced to units group by group; see `reduce_spans`.

    A tensor that several groups share is read once for all that cut it along the same dimension: a projection of an
    attention layer belongs to its heads and to the features of its heads.

    Args:
        values: tensor name -> value of each element.
        how: "sum", "mean" or "max".
        squared: reduce the squares.
    """

    def __init__(self, values: Mapping[str, Tensor], how: Reduction = "sum", *, squared: bool = False) -> None:
        self.finite = True
        self._values, self._how, self._squared = values, how, squared
        self._known: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def of(self, group: Group, roles: frozenset[str] | None) -> Tensor:
        """One value per unit; arguments, result and refusals are those of `reduce_spans`."""
        values, how = self._values, self._how
        spans = [s for s in group.spans if s.tensor in values and counts(s.role, roles)]
        if not spans:
            raise InputError(
                f"no tensor of group {group.name!r} has a value for this criterion",
                hint="choose another criterion, or count every coupled tensor",
            )
        if spans[0].index is None:
            whole = values[spans[0].tensor].reshape(group.shape)
            return whole.to(torch.float64).square() if self._squared else whole
        # Units are gathered on the CPU: atomics on a GPU add in changing order, and plans must be reproducible.
        # All spans at once: a residual stream has hundreds, and each call takes longer than what is in it.
        flats, units, times = [], [], []
        for span in spans:
            value = values[span.tensor]
            shape = value.shape
            index = (span.index if span.index is not None else torch.arange(value.numel()).view(value.shape)).cpu()
            dims = tuple(d for d, (one, size) in enumerate(zip(index.shape, shape, strict=True)) if one == 1 != size)
            flats.append(self._along(span, dims))
            units.append(index.flatten())
            times.append(float(math.prod(shape[d] for d in dims)))
        flat, unit = torch.cat(flats), torch.cat(units)
        # Looked at before units are picked: an element that belongs to no unit must not be NaN either.
        self.finite = self.finite and bool(torch.isfinite(flat).all())
        here = unit >= 0  # an element that belongs to no unit has a number below
        if not bool(here.all()):
            flat, unit = flat[here], unit[here]
        if how == "max":
            total = torch.full((group.size,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, unit, flat, "amax")
        else:
            total = torch.zeros(group.size, dtype=torch.float64).index_add_(0, unit, flat)
        if how == "mean":
            each = torch.tensor(times, dtype=torch.float64).repeat_interleave(torch.tensor([len(u) for u in units]))
            count = torch.bincount(unit, each if bool(here.all()) else each[here], minlength=group.size)
            total /= count.clamp(min=1)
        else:
            count = torch.bincount(unit, minlength=group.size)
        total[count == 0] = 0.0
        return total.view(group.shape).to(values[spans[0].tensor].device)

    def _along(self, span: Span, dims: tuple[int, ...]) -> Tensor:
        """The tensor of a span without the dimensions that no unit depends on: float64, flat, on the CPU."""
        key = (span.tensor, dims)
        if key in self._known:
            return self._known[key]
        value = self._values[span.tensor].detach()
        flat = _along(value, list(dims), self._how, squared=self._squared).cpu().to(torch.float64).flatten()
        if span.role != "self":  # a weight that is itself the unit stands in one group only: keeping it is of no use
            self._known[key] = flat
        return flat


def _along(value: Tensor, dims: list[int], how: Reduction, *, squared: bool) -> Tensor:
    """Reduce the dimensions that no unit depends on."""
    if squared:
        wide = value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)
        found = _squares(wide, dims)
        if dims and not _in_range(found):  # squares that leave float32
            found = _squares(wide.to(torch.float64), dims)
        return found
    if not dims:
        return value
    return value.amax(dims, True) if how == "max" else value.sum(dims, True, dtype=torch.float64)


def _in_range(found: Tensor) -> bool:
    """Whether no sum of squares is NaN or infinite, or so small that float32 may have lost some of it."""
    if not found.numel():
        return True
    least, most = (each.item() for each in found.aminmax())  # both are NaN where one of the sums is
    return least > TINY**2 and most < math.inf


def _squares(value: Tensor, dims: list[int]) -> Tensor:
    """Sums of squares along `dims`, which stay with size one, in float64."""
    if not dims:
        return value.to(torch.float64).square()
    if 0 not in dims or not value.is_contiguous():
        norms: Tensor = torch.linalg.vector_norm(value, 2, dims, True)
        return norms.to(torch.float64).square()
    # A norm over the rows of a matrix walks down every column, ten times slower than along the memory. So rows are
    # squared and added a few at a time, few enough that they stay in the cache.
    flat = value.reshape(value.shape[0], -1)
    total = torch.zeros(flat.shape[1], dtype=torch.float64, device=value.device)
    for rows in torch.split(flat, max(1, CHUNK // flat.shape[1])):
        total += rows.square().sum(0)
    total = total.view(1, *value.shape[1:])
    rest = [d for d in dims if d != 0]
    return total.sum(rest, True) if rest else total
