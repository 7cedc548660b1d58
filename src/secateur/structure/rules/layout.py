"""Rules for pure data movement: views, permutations, repetitions, shuffles."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.structure.axes import ONE, Axis, Conflict, product, resolve
from secateur.structure.rules.base import Call, register
from secateur.structure.trace import Axes


@register("view", "_unsafe_view", "_reshape_alias", "reshape", "view_copy")
def view(call: Call) -> Axes:
    """Row-major regrouping; dimensions factor or merge segment by segment."""
    source, result = call.first, call.results[0]
    axes = call.axes(source)
    if source.dtype != result.dtype and source.shape != result.shape:
        for axis in axes:
            call.lock(axis, "reinterpreted as another dtype")
        return tuple(call.fresh(n, "reinterpreted as another dtype") for n in result.shape)
    return regroup(call, axes, list(result.shape))


def regroup(call: Call, axes: Axes, sizes: Sequence[int]) -> Axes:
    """Axes after a row-major reshape to `sizes`.

    Dimensions are first divided into the smallest segments of equal product, so that a segment that cannot be
    factored locks nothing else.
    """
    if 0 in sizes:
        for axis in axes:
            call.lock(axis, "an empty tensor is regrouped")
        return tuple(call.fresh(n, "an empty tensor is regrouped") for n in sizes)
    out: list[Axis] = []
    todo = [axis for axis in axes if axis.size != 1]
    i = 0
    while i < len(sizes):
        if sizes[i] == 1:
            out.append(ONE)
            i += 1
            continue
        # The side that is behind grows until both products agree: that is the smallest segment.
        segment, want, have = [], 1, 1
        targets: list[int] = []
        while want != have or want == 1:
            if have <= want and todo and (have < want or have == 1):
                segment.append(todo.pop(0))
                have *= segment[-1].size
            elif i < len(sizes):
                targets.append(sizes[i])
                want *= sizes[i]
                i += 1
            else:
                break
        out.extend(_factor(call, segment, targets))
    return tuple(out)


def _factor(call: Call, segment: list[Axis], targets: list[int]) -> list[Axis]:
    if len(targets) == 1:
        return [product(segment)]
    rest: Axis = product(segment)
    out: list[Axis] = []
    try:
        for size in targets[:-1]:
            head, rest = call.recorder.space.split_product(rest, size)
            out.append(head)
        return [*out, resolve(rest)]
    except Conflict:
        why = "a reshape does not follow the structure of this dimension"
        for axis in segment:
            call.lock(axis, why)
        return [call.fresh(size, why) for size in targets]


@register("permute", "permute_copy")
def permute(call: Call) -> Axes:
    """Dimensions in another order."""
    axes = call.axes(call.first)
    return tuple(axes[d] for d in call.integers("dims"))


@register("transpose", "transpose_copy")
def transpose(call: Call) -> Axes:
    """Two dimensions change places."""
    axes = list(call.axes(call.first))
    a, b = call.integer("dim0"), call.integer("dim1")
    if axes:
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@register("t")
def t(call: Call) -> Axes:
    """Matrix transpose."""
    return tuple(reversed(call.axes(call.first)))


@register("unsqueeze")
def unsqueeze(call: Call) -> Axes:
    """A new dimension of size one."""
    axes = list(call.axes(call.first))
    axes.insert(call.integer("dim") % (len(axes) + 1), ONE)
    return tuple(axes)


@register("squeeze")
def squeeze(call: Call) -> Axes:
    """Dimensions of size one vanish."""
    axes = call.axes(call.first)
    if call.get("dim") is None:
        return tuple(axis for axis in axes if axis.size != 1)
    chosen = {d % len(axes) for d in call.integers("dim")} if axes else set()
    return tuple(axis for d, axis in enumerate(axes) if d not in chosen or axis.size != 1)


@register("expand", "expand_copy", "broadcast_to")
def expand(call: Call) -> Axes:
    """Size one repeats; each repetition is a new index set."""
    axes, shape = call.axes(call.first), call.results[0].shape
    padded = (ONE,) * (len(shape) - len(axes)) + axes
    return tuple(axis if axis.size == n else call.fresh(n) for axis, n in zip(padded, shape, strict=True))


@register("repeat")
def repeat(call: Call) -> Axes:
    """Whole copies after each other: a product with the repetition outside."""
    axes, times = call.axes(call.first), call.integers("repeats")
    padded = (ONE,) * (len(times) - len(axes)) + axes
    return tuple(product([call.fresh(k), axis]) for k, axis in zip(times, padded, strict=True))


@register("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fft(call: Call) -> Axes:
    """Fourier transforms mix the dimensions that they run over: those are locked."""
    axes = list(call.axes(call.first))
    for d in call.integers("dim"):
        call.lock(axes[d], "a Fourier transform runs over this dimension")
        axes[d] = call.fresh(call.results[0].shape[d], "frequencies")
    return tuple(axes)


@register("roll", "flip", "rot90")
def reorder(call: Call) -> Axes:
    """Positions change by a fixed number: the moved dimensions are locked."""
    axes = list(call.axes(call.first))
    turned = [0, 1] if call.func._schema.name.endswith("rot90") else range(len(axes))
    for d in call.integers("dims") or turned:
        call.lock(axes[d], "positions are rolled or flipped by number")
        axes[d] = call.fresh(call.results[0].shape[d], "rolled or flipped positions")  # a quarter turn swaps two
    return tuple(axes)


@register("tril", "triu")
def triangle(call: Call) -> Axes:
    """What stays depends on the positions in the last two dimensions."""
    axes = call.axes(call.first)
    for axis in axes[-2:]:
        call.lock(axis, "a triangle is cut out by position")
    return axes


@register("unfold")
def unfold(call: Call) -> Axes:
    """Sliding windows over one dimension."""
    axes = list(call.axes(call.first))
    dim = call.integer("dimension") % len(axes)
    if call.integer("size") == 1 and call.integer("step") == 1:
        return (*axes, ONE)
    call.lock(axes[dim], "cut into sliding windows")
    shape = call.results[0].shape
    axes[dim] = call.fresh(shape[dim], "counts sliding windows")
    return (*axes, call.fresh(shape[-1], "a position in a sliding window"))


@register("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def shuffle(call: Call) -> Axes:
    """Channels move into space (or back), or are interleaved: a product of channels and fixed factors."""
    axes, result = call.axes(call.first), call.results[0]
    if result.shape == call.first.shape and call.get("groups") is None:
        return axes  # by a factor of one
    name = call.func._schema.name
    at = 1 if name.endswith("channel_shuffle") else len(axes) - 3
    lead, (channels, *space) = axes[:at], axes[at:]
    split = call.recorder.space.split_product
    if not name.endswith("channel_shuffle"):
        for axis in space:
            call.lock(axis, "a spatial dimension")
    try:
        if name.endswith("pixel_shuffle"):
            r = call.integer("upscale_factor")
            outer, inner = split(channels, channels.size // (r * r))
            call.lock(inner, "moves into space")
            new = outer
        elif name.endswith("pixel_unshuffle"):
            r = call.integer("downscale_factor")
            new = product([channels, call.fresh(r * r, "comes from space")])
        else:
            groups, per_group = split(channels, call.integer("groups"))
            call.lock(groups, "the number of shuffled groups is fixed in the code")
            return (*lead, product([per_group, groups]), *space)
    except Conflict:
        call.lock(channels, "a shuffle does not follow the structure of the channels")
        new = call.fresh(result.shape[at], "shuffled channels")
        if name.endswith("channel_shuffle"):
            return (*lead, new, *space)
    return (*lead, new, *(call.fresh(n, "a spatial dimension") for n in result.shape[-2:]))


@register("view_as_complex", "view_as_real")
def pairs(call: Call) -> Axes:
    """The last dimension holds real and imaginary part."""
    axes = call.axes(call.first)
    if call.func._schema.name.endswith("real"):
        return (*axes, call.fresh(2, "real and imaginary part"))
    call.lock(axes[-1], "real and imaginary part")
    return axes[:-1]


def _in_order(call: Call) -> bool:
    """Whether the call only rewrites the strides of dimensions of size one (adaptive pooling to one position does)."""
    axes = call.axes(call.first)
    if call.get("size") is None or call.get("storage_offset"):
        return False
    size, stride = call.integers("size"), call.integers("stride")
    if size != [axis.size for axis in axes] or (1 in size and call.recorder.here.function.startswith("as_strided")):
        return False  # written by the user, for a dimension that may be longer elsewhere
    step, wanted = 1, []
    for n in reversed(size):
        wanted.append(step)
        step *= n
    dense = call.first.untyped_storage().nbytes() == step * call.first.element_size()
    in_order = all(n == 1 or s == w for n, s, w in zip(size, stride, reversed(wanted), strict=True))
    return dense and in_order and call.first.is_contiguous()


@register("diagonal")
def diagonal(call: Call) -> Axes:
    """Positions with the same number (but for an offset) in two dimensions, which are locked; the others stay."""
    axes = call.axes(call.first)
    chosen = {call.integer("dim1", 0) % len(axes), call.integer("dim2", 1) % len(axes)}
    for d in chosen:
        call.lock(axes[d], "its diagonal is taken, by number")
    rest = [axis for d, axis in enumerate(axes) if d not in chosen]
    return (*rest, call.fresh(call.results[0].shape[-1], "counts a diagonal"))


@register("as_strided")
def strided(call: Call) -> Axes:
    """Other strides over the same storage: the touched dimensions are locked, unless the elements stay in order."""
    if _in_order(call):
        return call.axes(call.first)
    for axis in call.axes(call.first):
        call.lock(axis, "accessed through explicit strides")
    return tuple(call.fresh(n, "accessed through explicit strides") for n in call.results[0].shape)
