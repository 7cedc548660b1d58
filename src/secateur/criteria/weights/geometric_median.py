"""Geometric median (FPGM): a filter that lies in the middle of the others can be replaced by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from secateur.criteria.base import Context, Criterion, register
from secateur.errors import RecipeError
from secateur.registry import one_of
from secateur.types import Group, Span

_CHUNK = 4096  # rows of the distance matrix at a time


@register
@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Criterion):
    """Score a unit by the sum of its distances to all units of its group: s_u = sum_v ||w_u - w_v||_2.

    The idea: the unit with the smallest sum is the one nearest to the geometric median of all, and what it
    computes is best represented by the others, whatever its norm. It finds duplicates, which magnitude does
    not. A bad choice where units are few or unlike each other (a small norm then also means a central place,
    and the ranking is close to that of magnitude), and, like magnitude, for comparing filters across layers
    in front of batch norms, which make their scale meaningless.

    Only producing weights (role "out", or the weight itself) make up w_u, without the bias; where several
    layers produce a unit (a residual stream) their slices are put one after the other. Units of unequal size
    (blocks at the edge) are padded with zeros.

    Args:
        reduce: "sum" as published, for ranking within a group; "mean" divides by the number of other units
            and by the root of the number of weights of a unit, which makes groups comparable (root mean
            square difference per weight) for the scope "global".

    Raises:
        RecipeError: a group without producing weights, or an unknown word.

    Cost:
        U^2 * m multiplications for U units of m weights in float64 (at most 4096 U numbers in memory), so
        kernels of wide layers take minutes; single elements U log U. No data.

    Source:
        He, Liu, Wang, Hu, Yang, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
        Acceleration", 2019, equation 7.

    Example:
        Of the rows 0, 4 and 10 the middle one is nearest to the others.

        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(1, 3, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0], [4.0], [10.0]]))
        >>> rows = Group("rows", "vector", (3,), (Span("weight", torch.tensor([[0], [1], [2]]), "self"),))
        >>> GeometricMedian().score(Context(layer, [rows]))["rows"]
        tensor([14., 10., 16.])
    """

    name: ClassVar[str] = "fpgm"
    summary: ClassVar[str] = "filters near the geometric median of their layer can be replaced by the others"
    speed: ClassVar[str] = "fast: no data"
    best_for: ClassVar[str] = "filters with similar norms and duplicates, within a layer"

    reduce: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        one_of("reduce", self.reduce, ("sum", "mean"))

    @property
    def roles(self) -> frozenset[str] | None:
        """The producing weights."""
        return frozenset({"out", "self"})

    def _score(self, context: Context) -> dict[str, Tensor]:
        weights = self.weights(context)
        return {group.name: self._of(group, weights) for group in context.groups}

    def _of(self, group: Group, weights: Mapping[str, Tensor]) -> Tensor:
        spans = [s for s in group.spans if s.role in ("out", "self")]
        if not spans:
            raise RecipeError(
                f"{self.name!r} compares producing weights, and group {group.name!r} has none",
                hint="leave the group out, or choose another criterion",
            )
        if spans[0].index is None:
            slices = weights[spans[0].tensor].reshape(-1, 1).to(torch.float64)
        else:
            slices = torch.cat([unit_slices(weights[s.tensor], s, group.size) for s in spans], dim=1)
        total = _scalar_distances(slices[:, 0]) if slices.shape[1] == 1 else _distances(slices)
        if self.reduce == "mean":
            total = total / (max(group.size - 1, 1) * slices.shape[1] ** 0.5)
        return total.view(group.shape)


def unit_slices(weight: Tensor, span: Span, units: int) -> Tensor:
    """The weights of every unit as a row.

    Args:
        weight: the tensor of the span.
        span: where the units live; its index is not None.
        units: number of units U.

    Returns:
        float64 [U, m]; units with fewer weights than the largest are padded with zeros.
    """
    assert span.index is not None
    index = span.index.to(weight.device)
    varying = [d for d in range(weight.dim()) if index.shape[d] != 1]
    rest = [d for d in range(weight.dim()) if d not in varying]
    places = weight.to(torch.float64).permute(*varying, *rest).reshape(index.numel(), -1)
    unit = index.permute(*varying, *rest).flatten()
    order = torch.argsort(unit, stable=True)
    order = order[unit[order] >= 0]
    unit = unit[order]
    count = torch.bincount(unit, minlength=units)
    first = torch.cumsum(count, 0) - count
    slot = torch.arange(len(unit), device=unit.device) - first[unit]
    rows = places.new_zeros(units, int(count.max()) if len(unit) else 0, places.shape[1])
    rows[unit, slot] = places[order]
    return rows.flatten(1)


def _distances(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(0)  # distances stay, and the rounding of |a|^2 + |b|^2 - 2ab shrinks
    return torch.cat([_cdist(part, rows).sum(1) for part in torch.split(rows, _CHUNK)])


def _cdist(a: Tensor, b: Tensor) -> Tensor:
    small = a.shape[0] * b.shape[0] * a.shape[1] <= 10**8
    mode = "donot_use_mm_for_euclid_dist" if small else "use_mm_for_euclid_dist"
    return torch.cdist(a, b, compute_mode=mode)


def _scalar_distances(values: Tensor) -> Tensor:
    """sum_v |x_u - x_v| for all u from one sort: x_(k) has k smaller and n-1-k larger ones."""
    ordered, order = torch.sort(values)
    n, rank = len(ordered), torch.arange(len(ordered), device=values.device, dtype=values.dtype)
    below = functional.pad(torch.cumsum(ordered, 0)[:-1], (1, 0))
    above = ordered.sum() - below - ordered
    total = torch.empty_like(values)
    total[order] = rank * ordered - below + above - (n - 1 - rank) * ordered
    return total
