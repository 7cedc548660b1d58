"""Rules for operations in space: pooling, interpolation, padding by reflection, im2col."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from secateur.structure.axes import Conflict, product
from secateur.structure.rules.base import Call, register
from secateur.structure.trace import Axes, Restrict

RANKS = {"1d": 1, "2d": 2, "3d": 3}
SPACE = "a spatial dimension"


def through(call: Call, axes: Axes, result: Tensor, untouched: Sequence[bool]) -> Axes:
    """The last dimensions after an operation in space: those that it maps index to index are what they were."""
    sizes = result.shape[result.dim() - len(axes) :]
    out = []
    for axis, size, same in zip(axes, sizes, untouched, strict=True):
        if not same:
            call.lock(axis, SPACE)
        out.append(axis if same else call.fresh(size, SPACE))
    return tuple(out)


def windows(call: Call, axes: Axes, *, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Axes:
    """The last dimensions after a sliding window; one of size 1, stride 1, without padding, touches nothing."""
    rank = len(axes)
    kernel, stride = (_each(sizes, rank) for sizes in (kernel, stride or kernel))
    padding = [p for at in range(0, len(padding), rank) for p in _each(padding[at : at + rank], rank)]
    padded = [any(padding[d::rank]) for d in range(rank)]  # on its two sides, or in front and behind
    untouched = [k == 1 and s == 1 and not p for k, s, p in zip(kernel, stride, padded, strict=True)]
    return through(call, axes, call.results[0], untouched)


def _each(sizes: Sequence[int], rank: int) -> list[int]:
    return list(sizes) if len(sizes) == rank else [sizes[0]] * rank


def _lead(call: Call) -> tuple[Axes, Axes]:
    """Batch and channels, and the one to three dimensions of space."""
    axes = call.axes(call.first)
    rank = next(r for key, r in RANKS.items() if key in call.func._schema.name)
    return axes[: len(axes) - rank], axes[len(axes) - rank :]


@register(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "max_pool2d", "mkldnn_max_pool2d",
)  # fmt: skip
def pool(call: Call) -> list[Axes]:
    """Channels are untouched, and so is space where the window is one position."""
    lead, space = _lead(call)
    out = windows(
        call, space, kernel=call.integers("kernel_size"), stride=call.integers("stride"),
        padding=call.integers("padding"),
    )  # fmt: skip
    if len(call.results) > 1:  # the places of the maxima are numbers that count all of space
        call.positions[1] = [*space]
    return [(*lead, *out)] * len(call.results)


@register(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_linear1d", "upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip
def resized(call: Call) -> Axes:
    """A dimension that keeps its size keeps its positions: it is replayed on those that stay."""
    lead, space = _lead(call)
    sizes = call.results[0].shape[len(lead) :]
    same = [axis.size == n for axis, n in zip(space, sizes, strict=True)]
    for i, scale in enumerate(_scales(call)[-len(space) :]):
        # A factor that rounds to the size that was there repeats positions and leaves others out all the same.
        same[i] = same[i] and scale in (None, 1)
    if "bicubic" in call.func._schema.name:  # neighbours take part with a factor of zero, and zero times NaN is NaN
        same = [False] * len(same)
    out = through(call, space, call.results[0], same)
    kept = [(len(lead) + i, axis) for i, axis in enumerate(space) if same[i]]
    number = call.number(call.first)
    call.restricted = Restrict([(number, d, a) for d, a in kept], [(0, d, a) for d, a in kept])
    if call.get("output_size") is not None:
        call.restricted.sizes[call.position("output_size")] = out
    return (*lead, *out)


def _scales(call: Call) -> list[object]:
    """The factor of every dimension of space, where the caller gave factors; that of the last one stands last."""
    factors = call.get("scale_factors") or call.get("scales")
    if factors is not None:
        return list(cast("Sequence[object]", factors)) if isinstance(factors, (list, tuple)) else [factors]
    return [call.get(name) for name in ("scales_d", "scales_h", "scales_w")]


@register(
    "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "adaptive_avg_pool2d",
)  # fmt: skip
def adaptive(call: Call) -> list[Axes]:
    """As many windows as positions are windows of one position."""
    lead, space = _lead(call)
    sizes = call.results[0].shape[len(lead) :]
    out = through(call, space, call.results[0], [axis.size == n for axis, n in zip(space, sizes, strict=True)])
    if call.get("output_size") is not None and len(call.results) == 1:
        call.restricted = Restrict([], [], {call.position("output_size"): out})
    if len(call.results) > 1:
        call.positions[1] = [*space]
    return [(*lead, *out)] * len(call.results)


@register(
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d",
)  # fmt: skip
def padded(call: Call) -> Axes:
    """Space grows by copies of its border; a dimension that nothing is added to stays what it is."""
    lead, space = _lead(call)
    amounts = call.integers("padding")
    same = [not any(amounts[2 * i : 2 * i + 2]) for i in reversed(range(len(space)))]
    return (*lead, *through(call, space, call.results[0], same))


@register("fractional_max_pool2d", "fractional_max_pool3d", "max_unpool2d", "max_unpool3d")
def in_space(call: Call) -> list[Axes]:
    """Batch and channels are untouched, and those of the places or samples are the same; the rest is data."""
    lead, space = _lead(call)
    others = call.axes(call.operand(1) if "unpool" in call.func._schema.name else call.tensor("random_samples"))
    if len(others) > len(lead):  # samples are given for a batch, also where there is none
        for axis, other in zip(lead, others[: len(lead)], strict=True):
            call.unify(axis, other)
    for axis in others[len(lead) :]:
        call.lock(axis, SPACE)
    if len(call.results) > 1:
        call.positions[1] = [*space]
    return [(*lead, *through(call, space, t, [False] * len(space))) for t in call.results]


@register("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sample(call: Call) -> Axes:
    """Channels of the input at places given by a grid."""
    axes, grid = call.axes(call.first), call.axes(call.operand(1))
    call.unify(axes[0], grid[0])
    for axis in (*axes[2:], *grid):
        call.lock(axis, SPACE)
    return (*axes[:2], *(call.fresh(n, SPACE) for n in call.results[0].shape[2:]))


@register("im2col")
def im2col(call: Call) -> Axes:
    """[n, c, h, w] -> [n, c x kernel, positions]."""
    x = call.first
    axes, result = call.axes(x), call.results[0]
    for axis in axes[-2:]:
        call.lock(axis, SPACE)
    kernel = result.shape[-2] // x.shape[-3]
    columns = product([axes[-3], call.fresh(kernel, "a position in the window")])
    return (*axes[:-3], columns, call.fresh(result.shape[-1], "counts windows"))


@register("col2im")
def col2im(call: Call) -> Axes:
    """[n, c x kernel, positions] -> [n, c, h, w]."""
    x = call.first
    axes, result = call.axes(x), call.results[0]
    try:
        channels, window = call.recorder.space.split_product(axes[-2], result.shape[-3])
    except Conflict:
        call.lock(axes[-2], "windows do not follow the structure of the channels")
        channels, window = call.fresh(result.shape[-3], "channels of windows"), axes[-2]
    for axis in (window, axes[-1]):
        call.lock(axis, "a position in the window")
    return (*axes[:-2], channels, *(call.fresh(n, SPACE) for n in result.shape[-2:]))
