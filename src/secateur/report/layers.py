"""The rows of a report: one for every tensor or stack that was pruned, one for every part that may not be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from secateur.kinds.layers.sub_blocks import group_of
from secateur.model.tensors import named_tensors
from secateur.planning import Plan
from secateur.report.histogram import distribution, histogram, near_zero
from secateur.report.record import Layer, Locked


def measure_layer(
    name: str, weight: Tensor, *, params_after: int, scores: Tensor | None, keep: Tensor, bins: int = 40
) -> Layer:
    """Measure a layer from the weight before pruning and the decision on its units.

    Args:
        name: of the layer or group.
        weight: before pruning, any shape.
        params_after: elements of the weight that are still stored.
        scores: one per unit, higher = keep; None where a training has decided, whose scores are gone.
        keep: bool, the shape of ``scores``, True = keep.
        bins: of both histograms.

    Returns:
        The layer's part of a report.

    Raises:
        NonFiniteError: NaN or Inf in the weight or the scores.

    Cost: two passes over the weight.
    """
    removed = int((~keep).sum())  # counted on the decision; what was cut with it elsewhere is in the parameters
    weights = distribution(weight, bins)
    return Layer(
        name=name,
        shape=tuple(weight.shape),
        params_before=weight.numel(),
        params_after=params_after,
        removed=removed,
        total=keep.numel(),
        sparsity=removed / keep.numel() if keep.numel() else 0.0,
        near_zero=weights.near_zero,
        weight_histogram=weights.histogram,
        score_histogram=None if scores is None else histogram(scores, bins),
        score_cut=float(scores[~keep].max()) if removed and scores is not None else None,
    )


def _masked(name: str, weight: Tensor, keep: Tensor) -> Layer:
    """The row of a weight of which only the mask is known."""
    weights, removed = distribution(weight, 40), int((~keep).sum())
    return Layer(
        name=name,
        shape=tuple(weight.shape),
        params_before=weight.numel(),
        params_after=weight.numel(),
        removed=removed,
        total=keep.numel(),
        sparsity=removed / max(keep.numel(), 1),
        near_zero=weights.near_zero,
        weight_histogram=weights.histogram,
    )


def pruned_layers(model: nn.Module, plan: Plan) -> list[Layer]:
    """What went of every group that competed.

    Args:
        model: as it came.
        plan: made in this process; a loaded one knows no scores.

    Returns:
        One row for each group, or for each stack where whole blocks went.

    Cost: two passes over one tensor of each group.
    """
    known = plan.evidence
    assert known is not None
    if plan.layers:
        return list(_stacks(model, plan, known.scores))
    tensors, found = named_tensors(model), []
    if not known.groups:  # masks that were given, or that a solver found: there are no scores to show
        return [_masked(name, tensors[name], mask) for name, mask in plan.masks.items() if name in tensors]
    for group in known.groups:
        # A group lives in many tensors. The one that makes the units is what people call the layer.
        span = next((s for s in group.spans if s.role in ("out", "self")), group.spans[0])
        weight = tensors[span.tensor]
        after = _size_after(weight, plan.cuts.get(span.tensor, {}))
        scores, keep = known.scores.get(group.name), known.keep[group.name]
        found.append(measure_layer(group.name, weight, params_after=after, scores=scores, keep=keep))
    return found


def locked_parts(model: nn.Module, plan: Plan) -> list[Locked]:
    """Every group that may not be cut, with the first of its reasons.

    Args:
        model: as it came.
        plan: made in this process; where it holds masks, nothing is locked.

    Returns:
        One row for each locked group. Its parameters are those of the tensors that make the units, each once: those
        that only read them have outputs of their own, under which they are counted.
    """
    known = plan.evidence
    if known is None or known.structure is None:
        return []
    tensors = named_tensors(model)
    locked = [group for group in known.structure.groups if group.locks]
    makers = [{span.tensor for span in group.spans if span.role == "out"} for group in locked]
    return [
        Locked.of(group.name, group.locks[0], params=sum(tensors[name].numel() for name in names))
        for group, names in zip(locked, makers, strict=True)
    ]


def _size_after(weight: Tensor, cuts: Mapping[int, Tensor]) -> int:
    """Elements that a tensor keeps: along a dimension that is not cut, all of them."""
    return math.prod(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(weight.shape))


def _stacks(model: nn.Module, plan: Plan, scores: Mapping[str, Tensor]) -> Iterator[Layer]:
    """One row for each stack of blocks: its parameters are those of all its blocks."""
    for name, stack in plan.layers.items():
        if stack.get("stubs"):
            yield _branches(model, plan, name, scores)
            continue
        blocks = [list(model.get_submodule(f"{name}.{i}").parameters()) for i in range(stack["size"])]
        sizes = [sum(p.numel() for p in block) for block in blocks]
        # No histogram of the weights: what is chosen is a block, and its tensors have nothing in common but the place.
        near = sum(near_zero(p) * p.numel() for block in blocks for p in block) / max(sum(sizes), 1)
        gone = set(stack["removed"])
        yield Layer(
            name=name,
            shape=(stack["size"],),
            params_before=sum(sizes),
            params_after=sum(size for i, size in enumerate(sizes) if i not in gone),
            removed=len(gone),
            total=stack["size"],
            sparsity=len(gone) / stack["size"],
            near_zero=near,
            score_histogram=histogram(scores[name]) if name in scores else None,
        )


def _branches(model: nn.Module, plan: Plan, name: str, scores: Mapping[str, Tensor]) -> Layer:
    """The row of a stack whose blocks lose branches: units are branches, parameters those of the stack."""
    known = plan.evidence
    assert known is not None
    group = group_of(name)
    keep = known.keep[group]
    parameters = list(model.get_submodule(name).parameters())
    gone = tuple(f"{stub}." for stub in plan.layers[name].get("stubs", {}))
    # A weight that something else holds as well stays.
    stay = {id(p) for key, p in model.named_parameters(remove_duplicate=False) if not key.startswith(gone)}
    whole = sum(p.numel() for p in parameters)
    return Layer(
        name=name,
        shape=(keep.numel(),),
        params_before=whole,
        params_after=sum(p.numel() for p in parameters if id(p) in stay),
        removed=int((~keep).sum()),
        total=keep.numel(),
        sparsity=float((~keep).float().mean()),
        near_zero=sum(near_zero(p) * p.numel() for p in parameters) / max(whole, 1),
        score_histogram=histogram(scores[group]) if group in scores else None,
    )
