"""From a request to a plan: capture, groups, scores, selection, slices, attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur import criteria
from secateur.apply.mask import expand
from secateur.apply.verify import certify
from secateur.criteria.base import Context, Criterion
from secateur.errors import RecipeError, TargetError, UnsupportedError
from secateur.planning.plan import Evidence, Plan, fingerprint
from secateur.select.budget import RemovalOrder, removal_order, removals_for
from secateur.select.granularity import Granularity, parse
from secateur.select.nm import NM
from secateur.select.select import select
from secateur.structure.attributes import edits
from secateur.structure.axes import kept
from secateur.structure.capture import capture
from secateur.structure.cost import CostModel
from secateur.structure.groups import STRUCTURED, Structure, structure
from secateur.structure.record import Record
from secateur.types import Data, Group, Loss

FLOOR = 0.1  # of each group stays under a global ranking, so that no layer is emptied by its scale
AMOUNTS = ("sparsity", "count", "threshold")
COSTS = ("params", "macs", "memory_bytes")


def is_structured(granularity: str | Mapping[str, Any] | Granularity) -> bool:
    """Whether units of this granularity are removed physically."""
    return isinstance(granularity, str) and granularity in STRUCTURED


def make_plan(
    model: nn.Module,
    example: Any,
    *,
    target: Mapping[str, float],
    criterion: str | Criterion | Mapping[str, Any] = "magnitude",
    granularity: str | Mapping[str, Any] | Granularity = "channel",
    data: Data | None = None,
    loss: Loss | None = None,
    scope: str = "global",
    allocation: str = "global",
    protect: Sequence[str] = (),
    min_keep: int = 1,
    round_to: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    tolerance: float | None = None,
) -> Plan:
    """Decide what goes. Nothing is changed; `Plan.apply` does it.

    Args:
        model: any module that runs on `example`.
        example: a tensor, a tuple of positional or a mapping of keyword arguments.
        target: one or several of sparsity, count, threshold (what goes, in units of the granularity) and params,
            macs (fraction kept at most), memory_bytes (weights at most).
        criterion: name, {"name": ..., options} or object.
        granularity: channel, neuron, head, head_dim, conv_group (removed physically), or element, vector, kernel,
            block, "2:4" (masks).
        data: batches, where the criterion needs them.
        loss: ``loss(model, batch) -> scalar``, where the criterion needs one and the batches do not imply it.
        scope: "global" (all units compete) or "local" (every group shrinks alike); masks also know "row".
        allocation: "global", "uniform", "erk" or "lamp": how a global amount is spread.
        protect: names or patterns, or "type:ClassName", that stay whole.
        min_keep: units that every group keeps at least; global structured rankings keep 10 % of each group anyway.
        round_to: kept counts of structured groups are multiples of this.
        seed: of everything random.
        dtype: precision of the certificate, "float32" or "float64".
        tolerance: of the certificate; default by dtype.

    Returns:
        the plan, not yet certified.

    Raises:
        RecipeError: an unknown name or a contradiction.
        TargetError: the target cannot be reached.
        UnsupportedError: nothing of the model can be cut at this granularity; says what is locked.
    """
    rule = rule_of(criterion)
    request = {
        "criterion": {"name": rule.name, **rule.options()},
        "granularity": granularity if isinstance(granularity, (str, Mapping)) else granularity.options(),
        "scope": scope,
        "allocation": allocation,
        "target": dict(target),
        "protect": list(protect),
        "min_keep": min_keep,
        "round_to": round_to,
        "seed": seed,
    }
    context = {"data": data, "loss": loss, "example": example, "seed": seed}
    if is_structured(granularity):
        assert isinstance(granularity, str)
        return _cut_plan(model, example, rule, granularity, request, context, dtype=dtype, tolerance=tolerance)
    return _mask_plan(model, rule, granularity, request, context)


def grouped(
    model: nn.Module,
    example: Any,
    granularity: str | Mapping[str, Any] | Granularity,
    protect: Sequence[str] = (),
) -> tuple[list[Group], Record | None]:
    """The groups of a granularity, and the record they were found in (None for masks)."""
    if not is_structured(granularity):
        return _parse(granularity).groups(model, protect), None
    assert isinstance(granularity, str)
    if example is None:
        raise RecipeError(
            f"granularity {granularity!r} needs an example.", hint="Pass example=the inputs of one forward pass."
        )
    record = capture(model, example)
    return structure(model, record, protect).free(granularity), record


def rule_of(criterion: str | Criterion | Mapping[str, Any]) -> Criterion:
    """A criterion by name, by {"name": ..., options}, or as it is."""
    if not isinstance(criterion, Mapping):
        return criteria.get(criterion)
    options = {key: value for key, value in criterion.items() if key != "name"}
    return criteria.get(str(criterion.get("name")), options)


# -- masks -----------------------------------------------------------------------------------------------------


def _mask_plan(
    model: nn.Module,
    rule: Criterion,
    granularity: str | Mapping[str, Any] | Granularity,
    request: Mapping[str, Any],
    context: Mapping[str, Any],
) -> Plan:
    kind = _parse(granularity)
    groups = kind.groups(model, request["protect"])
    if not groups:
        raise UnsupportedError(
            f"{type(model).__name__} has no weights to mask at granularity {kind.name!r}.",
            hint="Weights of linear and convolution layers are masked; check `protect`.",
        )
    target = dict(request["target"])
    wrong = sorted(set(target) - set(AMOUNTS))
    if wrong:
        raise RecipeError(
            f"target {wrong[0]!r} does not apply to masks.",
            why=f"granularity {kind.name!r} writes zeros; it does not remove {wrong[0]}",
            hint="Use sparsity, count or threshold, or a granularity that is cut: channel, neuron, head.",
        )
    scores = rule.score(Context(model, groups, **context))
    shared = {"scope": request["scope"], "granularity": kind, "groups": groups}
    if isinstance(kind, NM):
        _check_pattern(kind, target)
        keep = select(scores, **shared)
    else:
        allocation = None if request["allocation"] == "global" else request["allocation"]
        tensors = dict(model.named_parameters())
        shapes = {g.name: tuple(tensors[g.spans[0].tensor].shape) for g in groups}
        floor = request["min_keep"] if request["min_keep"] > 1 else 0
        keep = select(scores, **target, **shared, allocation=allocation, min_keep=floor, shapes=shapes)
    total = sum(k.numel() for k in keep.values())
    gone = total - sum(int(k.sum()) for k in keep.values())
    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups={},
        cuts={},
        attributes={},
        masks={name: mask.clone() for name, mask in expand(groups, keep, model=model).items()},
        units={"what": kind.name, "removed": gone, "total": total, "sparsity": gone / max(total, 1)},
        cost={},
        evidence=Evidence(model, groups, scores, keep),
    )


def _parse(granularity: str | Mapping[str, Any] | Granularity) -> Granularity:
    try:
        return parse(granularity)
    except RecipeError as error:
        raise RecipeError(
            error.what, why=error.why, hint=f"{error.hint}; removed for real: {', '.join(STRUCTURED)}"
        ) from error


def _check_pattern(kind: NM, target: Mapping[str, float]) -> None:
    n, m = kind.n, kind.m
    wanted = target.get("sparsity")
    if set(target) - {"sparsity"} or (wanted is not None and abs(wanted - (1 - n / m)) > 1e-9):
        raise RecipeError(
            f"granularity '{n}:{m}' fixes the sparsity at {1 - n / m:g}.",
            why=f"the target is {dict(target)}",
            hint=f"Leave the target at sparsity: {1 - n / m:g}.",
        )


# -- cuts ------------------------------------------------------------------------------------------------------


def _cut_plan(
    model: nn.Module,
    example: Any,
    rule: Criterion,
    granularity: str,
    request: Mapping[str, Any],
    context: Mapping[str, Any],
    *,
    dtype: str,
    tolerance: float | None,
) -> Plan:
    record = capture(model, example)
    found = structure(model, record, request["protect"])
    groups = found.free(granularity)
    if not groups:
        raise UnsupportedError(
            f"Nothing of {type(model).__name__} can be cut at granularity {granularity!r}.",
            why=_locked_summary(found, granularity),
            hint="See `secateur inspect` for what is locked, by which line, and what to do about it.",
        )
    scores = rule.score(Context(model, groups, capture=record, **context))
    if request["scope"] == "global" and not rule.comparable:
        scores = {name: _relative(score) for name, score in scores.items()}
    cost = CostModel(model, record)
    ids = {g.name: found.atoms[g.name].id for g in groups}
    keep = _choose(scores, groups, cost, ids, request)
    masks = {ids[name]: mask.numpy() for name, mask in keep.items() if not bool(mask.all())}
    counts = {i: int(mask.sum()) for i, mask in masks.items()}
    cuts: dict[str, dict[int, Tensor]] = {}
    for name, axes in found.tensors.items():
        for d, axis in enumerate(axes):
            stays = kept(axis, masks)
            if not stays.all():
                cuts.setdefault(name, {})[d] = torch.from_numpy(np.flatnonzero(stays))
    total, gone = sum(g.size for g in groups), sum(int((~m).sum()) for m in keep.values())
    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups={
            g.name: {
                "granularity": g.granularity,
                "size": g.size,
                "removed": torch.nonzero(~keep[g.name]).flatten().tolist(),
            }
            for g in groups
        },
        cuts=cuts,
        attributes=edits(model, record, counts),
        masks={},
        units={"what": granularity, "removed": gone, "total": total, "sparsity": gone / max(total, 1)},
        cost={"params": [cost.params({}), cost.params(counts)], "macs": [cost.macs({}), cost.macs(counts)]},
        evidence=Evidence(
            model,
            groups,
            scores,
            keep,
            found,
            lambda a, b: certify(a, b, example, record, masks, dtype=dtype, tolerance=tolerance),
        ),
    )


def _relative(score: Tensor) -> Tensor:
    """Scores in units of their group's mean size: weights before a normalisation have no scale of their own."""
    scale = score.abs().double().mean()
    return (score.double() / scale if float(scale) > 0 else score.double()).float()


def _locked_summary(found: Structure, granularity: str) -> str:
    reasons: dict[str, int] = {}
    for group in found.groups:
        for reason in group.locks[:1]:
            where = f" ({reason.where})" if reason.where else ""
            reasons[f"{reason.reason}{where}"] = reasons.get(f"{reason.reason}{where}", 0) + 1
    kinds = sorted({g.granularity for g in found.groups if not g.locks})
    text = f"free are only: {', '.join(kinds)}" if kinds else "everything is locked"
    first = sorted(reasons, key=lambda r: -reasons[r])[:3]
    return "; ".join([text, *first])


def _choose(
    scores: Mapping[str, Tensor],
    groups: Sequence[Group],
    cost: CostModel,
    ids: Mapping[str, int],
    request: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Kept units per group under the target: exact counts, or the shortest list of removals that meets all costs."""
    target: Mapping[str, float] = request["target"]
    unknown = sorted(set(target) - set(AMOUNTS) - set(COSTS))
    if unknown:
        raise RecipeError(
            f"target {unknown[0]!r} is not available for cuts.", hint=f"Use {', '.join(AMOUNTS + COSTS)}."
        )
    if request["scope"] not in ("global", "local"):
        raise RecipeError("scope 'row' belongs to masks.", hint="Use scope global or local for cuts.")
    if request["allocation"] not in ("global", "uniform"):
        raise RecipeError(
            f"allocation {request['allocation']!r} belongs to masks.", hint="Use global or uniform for cuts."
        )
    scope = "local" if request["allocation"] == "uniform" else request["scope"]
    floors = {g.name: _floor(g.size, request["min_keep"], scope) for g in groups}
    order = removal_order(scores, scope=scope, min_keep=floors, round_to=request["round_to"])
    needed = [0]
    for what, limit in target.items():
        needed.append(_removals(order, scores, cost, ids, what, float(limit), request))
    return order.keep(max(needed))


def _floor(size: int, min_keep: int, scope: str) -> int:
    share = ceil(FLOOR * size) if scope == "global" else 1
    return min(size, max(min_keep, share))


def _removals(
    order: RemovalOrder,
    scores: Mapping[str, Tensor],
    cost: CostModel,
    ids: Mapping[str, int],
    what: str,
    limit: float,
    request: Mapping[str, Any],
) -> int:
    total = int(order.sizes.sum())
    if what == "threshold":
        values = np.concatenate([scores[n].double().numpy().reshape(-1) for n in order.names])
        starts = np.concatenate([[0], np.cumsum(order.sizes)[:-1]])
        below = values[starts[order.group] + order.unit] < limit
        return int(np.flatnonzero(below)[-1]) + 1 if below.any() else 0
    if what in ("sparsity", "count"):
        removed = int(limit) if what == "count" else int(np.floor(limit * total + 0.5))
        if removed > len(order.group):
            raise TargetError(
                f"The target {what} {limit:g} cannot be reached.",
                why=f"at most {len(order.group)} of {total} units can go, sparsity {len(order.group) / total:.3f}",
                hint="Ask for less, lower min_keep, or use scope local.",
            )
        if request["round_to"] == 1:
            return removed
        return removals_for(order, lambda c: sum(c.values()), total - removed, f"kept units for {what}")

    def counts(c: Mapping[str, int]) -> dict[int, int]:
        return {ids[name]: n for name, n in c.items()}

    if what == "macs":
        return removals_for(order, lambda c: cost.macs(counts(c)), int(limit * cost.macs({})), "macs")
    if what == "params":
        return removals_for(order, lambda c: cost.params(counts(c)), int(limit * cost.params({})), "params")
    return removals_for(order, lambda c: cost.bytes(counts(c)), int(limit), "memory_bytes")
