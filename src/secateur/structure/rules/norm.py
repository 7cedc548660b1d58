"""Rules for normalisations and for everything that mixes a dimension but keeps its size."""

from __future__ import annotations

from torch import Tensor

from secateur.structure.axes import ONE, Axis, Conflict, resolve
from secateur.structure.rules.base import Call, register
from secateur.structure.trace import Axes, Restrict

COMPETE = "a softmax runs over this dimension: its positions are alternatives (tokens, experts, classes), not channels"


def mixed(call: Call, dims: list[int]) -> None:
    """The call mixes these dimensions of its first tensor and keeps them: replay it on what is kept."""
    x = call.first
    axes, number = call.axes(x), call.number(x)
    where = sorted({d % x.dim() for d in dims}) if x.dim() else []
    call.restricted = Restrict(
        [(number, d, axes[d]) for d in where], [(0, d, axes[d]) for d in where if d < call.results[0].dim()]
    )


@register("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(call: Call) -> list[Axes]:
    """Positions compete: one left out raises all others, so they are tokens, classes or experts, and no channels.

    Those that one layer makes and another sums up are hidden units all the same, which only the whole run shows
    (`structure.groups`): a cut softmax runs over what is kept.
    """
    axes = call.axes(call.first)
    if axes and resolve(axes[call.integer("dim")]) is not ONE:
        mixed(call, [call.integer("dim")])
        call.recorder.trace.competing.append((axes[call.integer("dim")], call.recorder.reason(COMPETE)))
    return [axes] * len(call.results)


@register("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def cumulative(call: Call) -> list[Axes]:
    """Every position depends on how many stand before it: of ones, this counts them."""
    axes = call.axes(call.first)
    if axes:
        call.lock(axes[call.integer("dim")], "accumulated along this dimension, in the order of its positions")
    return [axes] * len(call.results)


@register(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm",
)
def batch_norm(call: Call) -> list[Axes]:
    """Each channel by itself; parameters and statistics follow the channels (dimension 1)."""
    axes = call.axes(call.tensor("input"))
    if call.get("training") or "with_update" in call.func._schema.name:
        # Statistics of this very tensor: every other dimension is mixed.
        mixed(call, [d for d in range(len(axes)) if d != 1])
    for other in call.tensors()[1:]:
        if other.dim() == 1 and other.shape[0] == axes[1].size:
            call.unify(axes[1], call.axes(other)[0])
    statistics = [
        (axes[1],) if t.dim() == 1 and t.shape[0] == axes[1].size else tuple(call.fresh(n) for n in t.shape)
        for t in call.results[1:]
    ]
    return [axes, *statistics]


@register("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> list[Axes]:
    """Normalises over the last dimensions; replayed on what is kept of them."""
    x = call.tensor("input")
    shape = call.integers("normalized_shape")
    axes, count = call.axes(x), len(shape)
    first = x.dim() - count
    mixed(call, list(range(first, x.dim())))
    restrict = call.restricted
    assert restrict is not None
    for name in ("weight", "bias"):
        affine = call.get(name)
        if isinstance(affine, Tensor):
            own = call.axes(affine)
            for i in range(count):
                call.unify(axes[first + i], own[i])
            restrict.aligned += [(i, len(restrict.inputs) + i) for i in range(count)]
            restrict.inputs += [(call.number(affine), i, own[i]) for i in range(count)]
    restrict.sizes[call.position("normalized_shape")] = axes[first:]
    statistics = [
        tuple(call.fresh(n) if d >= first else axes[d] for d, n in enumerate(t.shape)) for t in call.results[1:]
    ]
    return [axes, *statistics]


@register("native_group_norm")
def group_norm(call: Call) -> list[Axes]:
    """Normalises within groups of channels: channels are groups x channels per group."""
    x, groups = call.tensor("input"), call.integer("group")
    axes = call.axes(x)
    channels: Axis = axes[1]
    for axis in axes[2:]:
        call.lock(axis, "a spatial dimension")  # every group is normalised over all of it
    try:
        group, _ = call.recorder.space.split_product(channels, groups)
    except Conflict:
        call.lock(channels, "normalisation groups do not follow the structure of the channels")
        group = call.fresh(groups, "fixed groups")
    restrict = Restrict([(call.number(x), 1, axes[1])], [(0, 1, axes[1])])
    for name in ("weight", "bias"):
        affine = call.get(name)
        if isinstance(affine, Tensor):
            call.unify(channels, call.axes(affine)[0])
            restrict.aligned.append((0, len(restrict.inputs)))
            restrict.inputs.append((call.number(affine), 0, call.axes(affine)[0]))
    restrict.sizes[call.position("C")] = axes[1]
    restrict.sizes[call.position("group")] = group
    call.restricted = restrict
    return [axes, *(tuple(call.fresh(n) for n in t.shape) for t in call.results[1:])]


@register("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> list[Axes]:
    """V * g / ||v||, the norm over all dimensions but one."""
    v, g, dim = call.tensor("v"), call.tensor("g"), call.integer("dim", 0)
    axes, axes_g = call.axes(v), call.axes(g)
    call.unify(axes[dim], axes_g[dim])
    mixed(call, [d for d in range(v.dim()) if d != dim % v.dim()])
    source = call.recorder.sources.get(call.number(v))
    if source is not None:  # the product is used where the weight would be
        call.recorder.trace.roles.setdefault((source[0], source[1][dim]), "out")
    return [axes, axes_g][: len(call.results)]
