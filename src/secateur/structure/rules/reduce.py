"""Rules for reductions: dimensions that vanish, or shrink to one."""

from __future__ import annotations

from torch import Tensor

from secateur.structure.axes import ONE
from secateur.structure.rules.base import Call, broadcast, register
from secateur.structure.trace import Axes, Restrict


@register(
    "sum", "mean", "var", "std", "amax", "amin", "logsumexp", "linalg_vector_norm", "norm", "var_mean", "std_mean",
    "nansum", "count_nonzero", "prod", "any", "all", "aminmax",
)  # fmt: skip
def reduction(call: Call) -> list[Axes]:
    """Sums, means and the like: what is kept of the dimension is reduced."""
    x = call.first
    axes = call.axes(x)
    chosen = _dims(call, len(axes))
    number = call.number(x)
    call.restricted = Restrict([(number, d, axes[d]) for d in sorted(chosen)])
    return [_reduced(axes, chosen, keep=t.dim() == len(axes)) for t in call.results]


def _dims(call: Call, rank: int) -> set[int]:
    """The dimensions that a reduction names; all where it names none."""
    return {d % rank for d in call.integers("dim") or range(rank)} if rank else set()


def _reduced(axes: Axes, chosen: set[int], *, keep: bool) -> Axes:
    if keep:
        return tuple(ONE if d in chosen else axis for d, axis in enumerate(axes))
    return tuple(axis for d, axis in enumerate(axes) if d not in chosen)


@register("max", "min", "median", "nanmedian")
def extreme(call: Call) -> list[Axes] | Axes:
    """Values and their positions along one dimension; the values are those of what is kept."""
    if isinstance(call.get("other"), Tensor):
        return broadcast(call, [call.axes(t) for t in call.tensors()])
    if call.get("dim") is None or len(call.results) != 2:
        return reduction(call)
    found = reduction(call)
    axes = call.axes(call.first)
    call.positions[1] = [axes[call.integer("dim")]] if axes else []
    return found


@register(
    "mse_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "soft_margin_loss",
)
def distance(call: Call) -> Axes:
    """An error per element, then its mean or sum."""
    axes = broadcast(call, [call.axes(t) for t in call.tensors()])
    if call.results[0].dim() == len(axes):
        return axes
    call.restricted = Restrict([(call.number(t), d, call.axes(t)[d]) for t in call.tensors() for d in range(t.dim())])
    rank = len(axes)
    if all(t.dim() == rank for t in call.tensors()):
        call.restricted.aligned = [tuple(d + rank * i for i in range(len(call.tensors()))) for d in range(rank)]
    return ()


@register("argmax", "argmin", "mode", "kthvalue")
def ordered(call: Call) -> list[Axes]:
    """The result holds positions, or depends on an order: the reduced dimension is locked."""
    axes = call.axes(call.first)
    chosen = _dims(call, len(axes))
    if call.get("dim") is None and "arg" not in call.func._schema.name:
        chosen = {len(axes) - 1} if axes else set()  # these take the last dimension where none is named
    for d in chosen:
        call.lock(axes[d], "the result names positions of this dimension or depends on all of it")
    return [_reduced(axes, chosen, keep=t.dim() == len(axes) and bool(axes)) for t in call.results]


@register("topk", "sort", "argsort", "unique_dim")
def sorting(call: Call) -> list[Axes]:
    """Sorted along one dimension, which is locked: its positions leave as numbers."""
    axes = list(call.axes(call.first))
    if not axes:
        return [()] * len(call.results)
    d = call.integer("dim", -1)
    if call.func._schema.name.endswith("unique_dim"):  # whole slices are compared, so an order depends on all of them
        for axis in axes:
            call.lock(axis, "its slices are sorted, each as a whole")
    call.lock(axes[d], "its positions are sorted and leave as numbers")
    axes[d] = call.fresh(call.results[0].shape[d], "sorted positions")
    if call.func._schema.name.endswith("unique_dim"):  # beside the values: numbers of positions, and how many
        return [tuple(axes), *(tuple(call.fresh(n, "counts positions") for n in t.shape) for t in call.results[1:])]
    return [tuple(axes)] * len(call.results)
