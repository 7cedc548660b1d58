"""Rules for operations in space: pooling, interpolation, padding by reflection, im2col."""

from __future__ import annotations

from secateur.structure.axes import product
from secateur.structure.rules.base import Call, register
from secateur.structure.trace import Axes

RANKS = {"1d": 1, "2d": 2, "3d": 3}


@register(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "max_pool2d", "mkldnn_max_pool2d", "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_avg_pool2d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "fractional_max_pool2d", "max_unpool2d",
)  # fmt: skip
def in_space(call: Call) -> list[Axes]:
    """Channels are untouched; the last one to three dimensions are data."""
    name = call.func._schema.name
    rank = next(r for key, r in RANKS.items() if key in name)
    x = call.first
    axes = call.axes(x)
    lead = axes[: x.dim() - rank]
    for axis in axes[x.dim() - rank :]:
        call.lock(axis, "a spatial dimension")
    return [(*lead, *(call.fresh(n, "a spatial dimension") for n in t.shape[len(lead) :])) for t in call.results]


@register("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sample(call: Call) -> Axes:
    """Channels of the input at places given by a grid."""
    axes = call.axes(call.first)
    for axis in (*axes[2:], *call.axes(call.operand(1))):
        call.lock(axis, "a spatial dimension")
    return (*axes[:2], *(call.fresh(n, "a spatial dimension") for n in call.results[0].shape[2:]))


@register("im2col")
def im2col(call: Call) -> Axes:
    """[n, c, h, w] -> [n, c x kernel, positions]."""
    x = call.first
    axes, result = call.axes(x), call.results[0]
    kernel = result.shape[-2] // x.shape[-3]
    columns = product([axes[-3], call.fresh(kernel, "a position in the window")])
    return (*axes[:-3], columns, call.fresh(result.shape[-1], "counts windows"))


@register("col2im")
def col2im(call: Call) -> Axes:
    """[n, c x kernel, positions] -> [n, c, h, w]."""
    x = call.first
    axes, result = call.axes(x), call.results[0]
    channels, window = call.recorder.space.split_product(axes[-2], result.shape[-3])
    call.lock(window, "a position in the window")
    return (*axes[:-2], channels, *(call.fresh(n, "a spatial dimension") for n in result.shape[-2:]))
