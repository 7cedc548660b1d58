"""From a request to a plan: capture, groups, scores, selection, slices, attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from secateur import criteria
from secateur.amounts.select import select
from secateur.criteria.base import Context, Criterion
from secateur.errors import RecipeError, UnsupportedError
from secateur.kinds.weights.granularity import STRUCTURAL, Granularity, parse
from secateur.kinds.weights.nm import NM
from secateur.masks import expand
from secateur.measure.staircase import width_grid
from secateur.model.call import device_of
from secateur.planning.cuts import AMOUNTS, cut_plan
from secateur.planning.experts import expert_groups, expert_plan
from secateur.planning.layers import layer_groups, layer_plan
from secateur.planning.plan import Evidence, Plan, counted, fingerprint
from secateur.structure.capture import capture
from secateur.structure.groups import structure
from secateur.structure.trace import Trace
from secateur.types import Data, Example, Group, Loss


def is_structured(granularity: str | Mapping[str, Any] | Granularity) -> bool:
    """Whether units of this granularity are removed physically."""
    return isinstance(granularity, str) and granularity in STRUCTURAL


def make_plan(
    model: nn.Module,
    example: Example,
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
    round_to: int | Literal["auto"] = 1,
    seed: int = 0,
    dtype: str = "float32",
    tolerance: float | None = None,
    expressible: bool = False,
) -> Plan:
    """Decide what goes. Nothing is changed; `Plan.apply` does it.

    Args:
        model: any module that runs on `example`.
        example: a tensor, a tuple of positional or a mapping of keyword arguments.
        target: one or several of sparsity, count, threshold (what goes, in units of the granularity) and params,
            macs (fraction kept at most), memory_bytes (weights at most).
        criterion: name, {"name": ..., options} or object.
        granularity: channel, neuron, head, head_dim, conv_group, expert, layer (removed physically), or element,
            vector, kernel, block, "2:4" (masks). Of experts every block loses equally many.
        data: batches, where the criterion needs them.
        loss: ``loss(model, batch) -> scalar``, where the criterion needs one and the batches do not imply it.
        scope: "global" (all units compete) or "local" (every group shrinks alike); masks also know "row".
        allocation: "global", "uniform", "erk" or "lamp": how a global amount is spread.
        protect: names or patterns, or "type:ClassName", that stay whole.
        min_keep: units that every group keeps at least; global structured rankings keep 10 % of each group anyway.
        round_to: kept counts of structured groups are multiples of this; "auto" takes the width grid that is
            measured on the model's device. With any grid but 1 a sparsity is met from above, not exactly.
        seed: of everything random.
        dtype: precision of the certificate, "float32" or "float64".
        tolerance: of the certificate; default by dtype.
        expressible: for Hugging Face models: cut so that a config describes the result, which `save_pretrained` and
            `from_pretrained` then handle without secateur. Groups of one config field keep equal counts, amounts are
            met to within one unit of each of them, and groups without a field stay whole.

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
        "round_to": width_grid(str(device_of(model))) if round_to == "auto" else round_to,
        "seed": seed,
        **({"expressible": True} if expressible else {}),
    }
    context = {"data": data, "loss": loss, "example": example, "seed": seed}
    if granularity == "layer":
        return layer_plan(model, example, rule, request, context, dtype=dtype, tolerance=tolerance)
    if expressible and not is_structured(granularity):
        raise RecipeError("expressible=True belongs to cuts; masks leave every shape as it is.")
    if granularity == "expert":
        return expert_plan(model, example, rule, request, context, dtype=dtype, tolerance=tolerance)
    if is_structured(granularity):
        assert isinstance(granularity, str)
        return cut_plan(model, example, rule, granularity, request, context, dtype=dtype, tolerance=tolerance)
    return _mask_plan(model, rule, granularity, request, context)


def grouped(
    model: nn.Module,
    example: Example,
    granularity: str | Mapping[str, Any] | Granularity,
    protect: Sequence[str] = (),
) -> tuple[list[Group], Trace | None]:
    """The groups of a granularity, and the record they were found in (None for masks)."""
    if not is_structured(granularity):
        return _parse(granularity).groups(model, protect), None
    assert isinstance(granularity, str)
    if example is None:
        raise RecipeError(
            f"granularity {granularity!r} needs an example.", hint="Pass example=the inputs of one forward pass."
        )
    if granularity == "layer":
        return layer_groups(model, example, protect), None
    record = capture(model, example)
    if granularity == "expert":
        return expert_groups(model, record, protect), record
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
    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups={},
        cuts={},
        attributes={},
        masks={name: mask.clone() for name, mask in expand(groups, keep, model=model).items()},
        units=counted(f"{kind.n}:{kind.m}" if isinstance(kind, NM) else kind.name, keep),
        cost={},
        evidence=Evidence(model, groups, scores, keep, example=context["example"]),
    )


def _parse(granularity: str | Mapping[str, Any] | Granularity) -> Granularity:
    try:
        return parse(granularity)
    except RecipeError as error:
        raise RecipeError(
            error.what, why=error.why, hint=f"{error.hint}; removed for real: {', '.join(STRUCTURAL)}"
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
