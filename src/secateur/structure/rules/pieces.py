"""Rules for what takes a dimension apart or puts one together: slices, pieces, concatenations, padding."""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor

from secateur.structure.axes import ONE, Axis, Conflict, Sum, concat, resolve
from secateur.structure.rules.base import Call, register
from secateur.structure.trace import Axes

MAX_PIECES = 16  # equal slices up to this number are taken as parts of one product


@register("slice")
def slice_(call: Call) -> Axes:
    """A sub-interval, or every k-th index."""
    source = call.first
    axes = list(call.axes(source))
    dim = call.integer("dim", 0) % len(axes)
    size, length = source.shape[dim], call.results[0].shape[dim]
    start = min(max(_wrap(call.integer("start"), size), 0), size)
    if not on_seams(axes[dim], start, length):
        call.recorder.opened.append(axes[dim])
    axes[dim] = interval(call, axes[dim], start, length, call.integer("step", 1), apart=True)
    return tuple(axes)


def _wrap(index: int, size: int) -> int:
    return index + size if index < 0 else index


def on_seams(axis: Axis, start: int, length: int) -> bool:
    """Whether an interval begins and ends where parts of a concatenation meet."""
    node = resolve(axis)
    seams = {0, node.size}
    if isinstance(node, Sum):
        seams |= set(accumulate(part.size for part in node.parts))
    return {start, start + length} <= seams


def interval(call: Call, axis: Axis, start: int, length: int, step: int = 1, *, apart: bool = False) -> Axis:
    """Positions start, start + step, ... of an axis; `apart` = not one of several equal pieces."""
    size, space = axis.size, call.recorder.space
    if length == size:
        return axis
    if length == 0:
        call.lock(axis, "nothing of it is taken here, and how much would be depends on its size")
        return call.fresh(0, "an empty slice")
    try:
        if step > 1:
            if size % step or start >= step or length != size // step:
                raise Conflict
            outer, inner = space.split_product(axis, size // step)
            call.lock(inner, "a strided slice takes one of several positions")
            return outer
        equal = length > 1 and size % length == 0 and start % length == 0 and size // length <= MAX_PIECES
        if equal and not apart:
            return _piece(call, axis, length)
        return _between(call, axis, start, length)
    except Conflict:
        call.lock(axis, "a slice does not follow the structure of this dimension")
        return call.fresh(length, "a slice that does not follow the structure of its dimension")


def _piece(call: Call, axis: Axis, length: int) -> Axis:
    outer, inner = call.recorder.space.split_product(axis, axis.size // length)
    call.lock(outer, "one of several equal pieces is taken by its number")
    return inner


def _between(call: Call, axis: Axis, start: int, length: int) -> Axis:
    _, tail = call.recorder.space.split_sum(axis, start)
    assert tail is not None
    piece, _ = call.recorder.space.split_sum(tail, length)
    assert piece is not None
    return piece


@register("select")
def select(call: Call) -> Axes:
    """One position of a dimension: its number would change if the dimension were cut."""
    axes = list(call.axes(call.first))
    axis = axes.pop(call.integer("dim") % len(axes))
    call.lock(axis, "a single position is picked by number")
    return tuple(axes)


@register("unbind")
def unbind(call: Call) -> list[Axes]:
    """Every position becomes a tensor of its own."""
    axes = list(call.axes(call.first))
    axis = axes.pop(call.integer("dim") % len(axes))
    call.lock(axis, "every position becomes a tensor of its own")
    return [tuple(axes)] * len(call.results)


@register("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "unsafe_split")
def split(call: Call) -> list[Axes]:
    """Consecutive pieces; equal ones share one index set."""
    source = call.first
    axes = list(call.axes(source))
    dim = call.integer("dim") % len(axes)
    lengths = [piece.shape[dim] for piece in call.results]
    free_sizes = "with_sizes" in call.func._schema.name
    out, start = [], 0
    if free_sizes and not all(
        on_seams(axes[dim], at - n, n) for n, at in zip(lengths, accumulate(lengths), strict=True)
    ):
        call.recorder.opened.append(axes[dim])
    for length in lengths:
        apart = len(set(lengths)) > 1 or (free_sizes and on_seams(axes[dim], start, length))
        part = interval(call, axes[dim], start, length, apart=apart)
        out.append((*axes[:dim], part, *axes[dim + 1 :]))
        start += length
    return out


@register("glu")
def glu(call: Call) -> Axes:
    """One half of a dimension times the sigmoid of the other."""
    axes = list(call.axes(call.first))
    dim = call.integer("dim", -1) % len(axes)
    axes[dim] = interval(call, axes[dim], 0, axes[dim].size // 2)
    return tuple(axes)


@register("cat", "concat")
def cat(call: Call) -> Axes:
    """Concatenation: an ordered sum along one dimension, equality along the others."""
    everything = call.listed("tensors")
    tensors: list[Tensor] = [x for x in everything if x.dim() > 1 or x.numel() > 0] or everything[:1]
    dim = call.integer("dim", 0)
    shapes = [call.axes(x) for x in tensors]
    dim %= len(shapes[0])
    for other in shapes[1:]:
        for d, (a, b) in enumerate(zip(shapes[0], other, strict=True)):
            if d != dim:
                call.unify(a, b)
    joined = concat([axes[dim] for axes in shapes if axes[dim].size > 0])
    return (*shapes[0][:dim], joined, *shapes[0][dim + 1 :])


@register("stack")
def stack(call: Call) -> Axes:
    """A new dimension that counts the operands."""
    tensors = call.listed("tensors")
    shapes = [call.axes(x) for x in tensors]
    for other in shapes[1:]:
        for a, b in zip(shapes[0], other, strict=True):
            call.unify(a, b)
    out = list(shapes[0])
    out.insert(call.integer("dim", 0) % (len(out) + 1), call.fresh(len(tensors), "counts the stacked tensors"))
    return tuple(out)


@register("constant_pad_nd")
def pad(call: Call) -> Axes:
    """Constants on both sides of a dimension; negative padding crops."""
    axes = list(call.axes(call.first))
    amounts = call.integers("pad")
    for i in range(len(amounts) // 2):
        low, high = amounts[2 * i], amounts[2 * i + 1]
        dim = len(axes) - 1 - i
        if low < 0 or high < 0:
            axes[dim] = _cropped(call, axes[dim], max(-low, 0), max(-high, 0))
        why = "padded by a fixed amount"
        sides = [call.fresh(n, why) if n > 0 else None for n in (low, high)]
        axes[dim] = concat([part for part in (sides[0], axes[dim], sides[1]) if part is not None])
    return tuple(axes)


def _cropped(call: Call, axis: Axis, low: int, high: int) -> Axis:
    """What is left between two ends whose sizes stand in the code."""
    try:
        front, rest = call.recorder.space.split_sum(axis, low)
        middle, back = call.recorder.space.split_sum(rest or ONE, axis.size - low - high)
    except Conflict:
        front, middle, back = axis, None, None
    for end in (front, back):
        if end is not None:
            call.lock(end, "cropped by a fixed amount")
    return middle or call.fresh(axis.size - low - high, "what is left of a cropped dimension")
