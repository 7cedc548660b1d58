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
    for axis in (axes[dim], *call.axes(call.tensor("index"))):
        call.lock(axis, BY_NUMBER)
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
    return _read(call)[0]


def _read(call: Call) -> tuple[Axes, list[Axis]]:
    """Dimensions of x[i, :, j], and those of them that nothing indexes."""
    axes, indices = call.axes(call.first), _indices(call)
    where, picked, plain = _picked(call, axes, indices)
    rest = [axis for d, axis in enumerate(axes) if d not in where]
    first = where[0] if where and where == list(range(where[0], where[-1] + 1)) else 0
    out = (*rest[:first], *picked, *rest[first:])
    if call.func._schema.name.rstrip("_").endswith("put") or (plain and len(out) == call.results[0].dim()):
        return out, rest
    shape = call.results[0].shape  # a mask makes one dimension of unknown length
    count = len(shape) - len(rest)
    chosen = tuple(call.fresh(n, BY_NUMBER) for n in shape[first : first + count])
    return (*rest[:first], *chosen, *rest[first:]), rest


def _indices(call: Call) -> list[Tensor | None]:
    return list(cast("Sequence[Tensor | None]", call.get("indices")))


def _picked(call: Call, axes: Axes, indices: list[Tensor | None]) -> tuple[list[int], Axes, bool]:
    """Numbers of the dimensions that index tensors address, what takes their place, and whether none is a mask."""
    where, tables, d, plain = [], [], 0, True
    for item in indices:
        mask = item is not None and item.dtype in (torch.bool, torch.uint8)
        width = item.dim() if mask and item is not None else 1
        if item is not None:
            plain = plain and not mask
            for at in range(d, d + width):
                call.lock(axes[at], BY_NUMBER)
                where.append(at)
            if mask:  # it is as large as what it masks
                for at, axis in enumerate(call.axes(item), d):
                    call.unify(axes[at], axis)
            else:
                tables.append(call.axes(item))
                _lock_constant(call, item)
        d += width
    return where, broadcast(call, tables), plain


@register("bucketize", "searchsorted")
def bucketize(call: Call) -> Axes:
    """Every value is replaced by the number of its interval, among borders that each row of a table has."""
    values, borders = call.args[:2] if "bucket" in call.func._schema.name else call.args[1::-1]
    table = call.axes(cast(Tensor, borders))
    call.lock(table[-1], BY_NUMBER)
    axes = call.axes(values) if isinstance(values, Tensor) else ()
    if len(table) > 1:
        for a, b in zip(table[:-1], axes, strict=False):
            call.unify(a, b)
    sorter = call.get("sorter")
    for axis in call.axes(sorter) if isinstance(sorter, Tensor) else ():
        call.lock(axis, BY_NUMBER)
    return axes


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
        *(
            tuple(columns if d == 1 and n == columns.size else call.fresh(n, BY_NUMBER) for d, n in enumerate(t.shape))
            for t in others
        ),
    ]


@register("_pack_padded_sequence")
def pack(call: Call) -> list[Axes]:
    """Steps of all sequences one after the other: [time, batch, ...] -> [steps, ...], and how many at each time."""
    axes = call.axes(call.first)
    for axis in axes[:2]:
        call.lock(axis, BY_NUMBER)
    data, sizes = call.results
    return [(call.fresh(data.shape[0], BY_NUMBER), *axes[2:]), (call.fresh(sizes.shape[0], BY_NUMBER),)]


@register("gather")
def gather(call: Call) -> Axes:
    """One position per element of the index along a dimension."""
    axes, picks = call.axes(call.first), call.axes(call.tensor("index"))
    if not axes:
        return ()
    dim = call.integer("dim") % len(axes)
    call.lock(axes[dim], BY_NUMBER)
    if not call.is_activation(call.tensor("index")) and dim < len(picks):
        call.lock(picks[dim], "a stored list of positions")
    for d, (a, b) in enumerate(zip(axes, picks, strict=True)):
        if d != dim:
            _same_or_lock(call, a, b)
    return picks


@register("masked_scatter")
def masked_scatter(call: Call) -> Axes:
    """Elements of a source, in their order, where a mask says so: all are positions."""
    axes = broadcast(call, [call.axes(call.first), call.axes(call.tensor("mask"))])
    for axis in (*axes, *call.axes(call.tensor("source"))):
        call.lock(axis, BY_NUMBER)
    return axes


@register("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
def scatter(call: Call) -> Axes:
    """Writes at given positions of one dimension; the other dimensions agree with the index and the source."""
    axes = call.axes(call.first)
    if not axes:
        return axes
    dim = call.integer("dim") % len(axes)
    call.lock(axes[dim], BY_NUMBER)
    index = call.axes(call.tensor("index"))
    if call.func._schema.name.startswith("aten::index"):  # a list of positions, as long as the source is there
        for axis in index:
            call.lock(axis, BY_NUMBER)
        index = ()
    for other in (index, *(call.axes(t) for t in (call.get("src"), call.get("source")) if isinstance(t, Tensor))):
        if len(other) == len(axes):
            call.lock(other[dim], BY_NUMBER)  # several of them may be put in the same place
            for d, (a, b) in enumerate(zip(axes, other, strict=True)):
                if d != dim:
                    _same_or_lock(call, a, b)
    return axes


@register("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> Axes:
    """x[i] = values: indexed dimensions are locked, the others agree with the values."""
    out, rest = _read(call)
    kept = {id(axis) for axis in rest}
    for a, b in zip(reversed(out), reversed(call.axes(call.tensor("values"))), strict=False):
        if b.size != 1 and id(a) in kept:
            _same_or_lock(call, a, b)
        elif b.size == a.size:
            call.unify(a, b)
        else:
            call.lock(b, BY_NUMBER)
    return call.axes(call.first)


def _same_or_lock(call: Call, a: Axis, b: Axis) -> None:
    if a.size == b.size:
        call.unify(a, b)
    else:
        call.lock(a, BY_NUMBER)
        call.lock(b, BY_NUMBER)
