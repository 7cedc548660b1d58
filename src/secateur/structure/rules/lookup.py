"""Rules for reads and writes at positions given by tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from secateur.structure.axes import Axis
from secateur.structure.rules.base import Call, broadcast, register
from secateur.structure.trace import Axes

BY_NUMBER = "its positions are addressed by number"


@register("embedding")
def embedding(call: Call) -> Axes:
    """Rows of a table."""
    weight, indices = call.tensor("weight"), call.tensor("indices")
    rows, columns = call.axes(weight)
    call.lock(rows, "the vocabulary of a table", "rows are addressed by number")
    number = call.number(weight)
    name, dims = call.recorder.sources.get(number, ("", ()))
    if number in call.recorder.weights:
        call.recorder.trace.widths.append(columns)
    if name:
        call.recorder.trace.roles.setdefault((name, dims[1]), "out")
    return (*call.axes(indices), columns)


@register("index_select")
def index_select(call: Call) -> Axes:
    """Chosen positions of one dimension."""
    axes = list(call.axes(call.first))
    dim = call.integer("dim") % len(axes)
    call.lock(axes[dim], BY_NUMBER)
    _lock_constant(call, call.tensor("index"))
    axes[dim] = call.fresh(call.results[0].shape[dim], BY_NUMBER)
    return tuple(axes)


def _lock_constant(call: Call, index: Tensor) -> None:
    """A stored list of positions stays as it is."""
    if not call.is_activation(index):
        for axis in call.axes(index):
            call.lock(axis, "a stored list of positions")


@register("index", "_unsafe_index")
def index(call: Call) -> Axes:
    """x[i, :, j] with index tensors: indexed dimensions are locked, the others stay."""
    axes, indices = call.axes(call.first), _indices(call)
    indices += [None] * (len(axes) - len(indices))
    result = call.results[0]
    if any(i is not None and i.dtype == torch.bool for i in indices):
        return _masked(call, axes, indices)
    where = [d for d, i in enumerate(indices) if i is not None]
    looked_up = broadcast(call, [call.axes(i) for i in indices if i is not None])
    for d in where:
        call.lock(axes[d], BY_NUMBER)
        _lock_constant(call, cast(Tensor, indices[d]))
    adjacent = where == list(range(where[0], where[-1] + 1))
    first = where[0] if adjacent else 0
    rest = [axis for d, axis in enumerate(axes) if d not in where]
    out = (*rest[:first], *looked_up, *rest[first:])
    return out if len(out) == result.dim() else tuple(call.fresh(n, BY_NUMBER) for n in result.shape)


def _indices(call: Call) -> list[Tensor | None]:
    return list(cast("Sequence[Tensor | None]", call.get("indices")))


def _masked(call: Call, axes: Axes, indices: list[Tensor | None]) -> Axes:
    """A boolean mask over leading dimensions makes one dimension of unknown length."""
    d = 0
    for item in indices:
        if item is None:
            break
        for _ in range(item.dim()):
            call.lock(axes[d], BY_NUMBER)
            d += 1
    rest = axes[d:]
    result = call.results[0]
    lead = tuple(call.fresh(n, BY_NUMBER) for n in result.shape[: result.dim() - len(rest)])
    return (*lead, *rest)


@register("bucketize", "searchsorted")
def bucketize(call: Call) -> Axes:
    """Every value is replaced by the number of its interval."""
    values, table = call.args[:2] if "bucket" in call.func._schema.name else call.args[1::-1]
    for axis in call.axes(cast(Tensor, table)):
        call.lock(axis, BY_NUMBER)
    return call.axes(values) if isinstance(values, Tensor) else ()


@register("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[Axes]:
    """Sums, means or maxima of rows of a table."""
    rows, columns = call.axes(call.first)
    call.lock(rows, "the vocabulary of a table", "rows are addressed by number")
    name, dims = call.recorder.sources.get(call.number(call.first), ("", ()))
    if call.number(call.first) in call.recorder.weights:
        call.recorder.trace.widths.append(columns)
    if name:
        call.recorder.trace.roles.setdefault((name, dims[1]), "out")
    bags, *others = call.results
    weights = call.get("per_sample_weights")
    for axis in call.axes(weights) if isinstance(weights, Tensor) else ():
        call.lock(axis, BY_NUMBER)
    return [
        (call.fresh(bags.shape[0], BY_NUMBER), columns),
        *(tuple(columns if n == columns.size else call.fresh(n, BY_NUMBER) for n in t.shape) for t in others),
    ]


@register("_pack_padded_sequence")
def pack(call: Call) -> list[Axes]:
    """Steps of all sequences one after the other: [time, batch, ...] -> [steps, ...], and how many at each time."""
    axes = call.axes(call.first)
    for axis in axes[:2]:
        call.lock(axis, BY_NUMBER)
    data, sizes = call.results
    return [(call.fresh(data.shape[0], BY_NUMBER), *axes[2:]), (call.fresh(sizes.shape[0], BY_NUMBER),)]


@register("gather", "take_along_dim")
def gather(call: Call) -> Axes:
    """One position per element of the index along a dimension."""
    axes, picks = call.axes(call.first), call.axes(call.tensor("index"))
    if not axes:
        return ()
    dim = call.integer("dim") % len(axes)
    call.lock(axes[dim], BY_NUMBER)
    for d, (a, b) in enumerate(zip(axes, picks, strict=True)):
        if d != dim:
            _same_or_lock(call, a, b)
    return picks


@register("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "masked_scatter")
def scatter(call: Call) -> Axes:
    """Writes at given positions of one dimension; the other dimensions agree with the source."""
    axes = call.axes(call.first)
    if call.get("dim") is None or not axes:
        for axis in axes:
            call.lock(axis, BY_NUMBER)
        return axes
    dim = call.integer("dim") % len(axes)
    call.lock(axes[dim], BY_NUMBER)
    for other in (call.get("src"), call.get("source")):
        if isinstance(other, Tensor) and other.dim() == len(axes):
            for d, (a, b) in enumerate(zip(axes, call.axes(other), strict=True)):
                if d != dim:
                    _same_or_lock(call, a, b)
    return axes


@register("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> Axes:
    """x[i] = values: indexed dimensions are locked, the others agree with the values."""
    axes, indices, values = call.axes(call.first), _indices(call), call.tensor("values")
    d = 0
    for item in indices:
        width = item.dim() if item is not None and item.dtype == torch.bool else 1
        for axis in axes[d : d + width]:
            if item is not None:
                call.lock(axis, BY_NUMBER)
        d += width
    rest = [a for i, a in enumerate(axes) if i >= len(indices) or indices[i] is None] if d <= len(axes) else []
    tail = axes[d:] if all(i is not None for i in indices) else tuple(rest)
    for a, b in zip(reversed(tail), reversed(call.axes(values)), strict=False):
        if b.size != 1:
            _same_or_lock(call, a, b)
    return axes


def _same_or_lock(call: Call, a: Axis, b: Axis) -> None:
    if a.size == b.size:
        call.unify(a, b)
    else:
        call.lock(a, BY_NUMBER)
        call.lock(b, BY_NUMBER)
