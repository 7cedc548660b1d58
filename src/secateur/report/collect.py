"""What the report of a run says, collected from the plan, the two snapshots and the journal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from secateur.files.seeds import canonical_json
from secateur.measure import Yardstick
from secateur.model.call import device_of
from secateur.planning import Plan
from secateur.planning.decision import fingerprint
from secateur.recipe import Recipe
from secateur.registry import listed
from secateur.report.assembly import Effect, Events, Goal, Method, Origin, build, environment
from secateur.report.bound import Limit
from secateur.report.journal import Journal
from secateur.report.layers import locked_parts, pruned_layers
from secateur.report.network import network_parts
from secateur.report.record import Choice, Control, Report, UnitCount
from secateur.request import Named, Request
from secateur.types import Degradation, Snapshot


def collect(
    model: nn.Module,
    plan: Plan,
    recipe: Recipe,
    *,
    before: Snapshot,
    after: Snapshot,
    run: Journal,
    judged: Yardstick,
    control: Control | None = None,
    limit: Limit | None = None,
    after_cut: Mapping[str, float] | None = None,
    title: str = "",
    command: str = "",
) -> Report:
    """The report of a finished run.

    Args:
        model: as it came.
        plan: what was decided, certified where something was cut.
        recipe: as it was resolved.
        before: the model as it came, measured.
        after: the model as it goes, measured.
        run: stages, fallbacks, doubts and training.
        judged: how quality was measured, or why it was not.
        control: the original after the same recovery steps, where that was asked for.
        limit: what was found for "at most this loss".
        after_cut: quality right after the cut, before any recovery.
        title: what the report calls the run; the model's class by default.
        command: the command line that reproduces it.

    Returns:
        A validated report.

    Cost: two passes over the weights of the layers that competed, for their histograms.
    """
    return build(
        Origin(
            title or type(model).__name__,
            fingerprint(model),
            environment(device=str(device_of(model)), seed=recipe.seed),
            command,
            recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
        ),
        Method(
            _choice(plan.request.criterion),
            _granularity(plan.request),
            recipe.scope,
            Choice(name=plan.request.allocation),
        ),
        replace(
            _effect(plan, before, after),
            after_cut_quality=after_cut,
            quality_on=judged.on,
            quality_missing=judged.why,
            quality_samples=judged.samples(),
            control=control,
        ),
        goal=_limited(_goal(plan, before, after), limit),
        events=_with_left_out(run.events(), plan),
        layers=pruned_layers(model, plan),
        network=network_parts(model, plan),
        locked=locked_parts(model, plan),
    )


def forecast(
    model: nn.Module, plan: Plan, recipe: Recipe, *, before: Snapshot, after: Snapshot, run: Journal, title: str = ""
) -> Report:
    """What a plan would bring, measured on an applied copy: the report of a run that has not taken place.

    Args:
        model: as it is.
        plan: what would be done.
        recipe: as it was resolved.
        before: the model as it is, measured.
        after: the copy, measured.
        run: fallbacks and doubts.
        title: what the report calls it; the model's class by default.

    Returns:
        A validated report without layers, stages and achieved target: nothing was achieved yet.
    """
    return build(
        Origin(
            title or type(model).__name__,
            plan.fingerprint,
            environment(device=str(device_of(model)), seed=recipe.seed),
        ),
        Method(
            _choice(plan.request.criterion),
            Choice(name=plan.units["what"]),
            recipe.scope,
            Choice(name=plan.request.allocation),
        ),
        replace(_effect(plan, before, after), quality_missing="it is not predicted"),
        events=_with_left_out(replace(run.events(), seconds={}), plan),
        goal=None if plan.request.target is None else Goal(target=plan.request.target.flat()),
    )


def _effect(plan: Plan, before: Snapshot, after: Snapshot) -> Effect:
    units = plan.units
    return Effect(
        before,
        after,
        applied="mask" if plan.masks else "cut",
        units=UnitCount(removed=units["removed"], total=units["total"], what=f"{units['what']} units"),
        certificate=plan.certificate,
        certificate_reason="" if plan.certificate else "zeros are written; no slice is cut",
        left_out=plan.left_out,
        conditions=plan.conditions,
    )


def _with_left_out(events: Events, plan: Plan) -> Events:
    """The events of a run, and what it could not do although it was asked."""
    return replace(events, degradations=(*events.degradations, *shortfall(plan)))


def shortfall(plan: Plan) -> tuple[Degradation, ...]:
    """What of the asked weights a plan of masks does not cover, in one sentence; empty where nothing is left out."""
    missing = [one for one in plan.left_out if one.wanted]
    if not missing:
        return ()
    names = listed([one.name for one in missing], form="{}")
    why = dict.fromkeys(f"{one.why}; {one.hint}" if one.hint else one.why for one in missing)
    weights = sum(one.params for one in missing)
    return (Degradation("plan", f"{weights:,} weights were left out: {names}", " / ".join([*why][:3])),)


def _goal(plan: Plan, before: Snapshot, after: Snapshot) -> Goal | None:
    """What was asked for and reached; None where the units themselves were given."""
    found: dict[str, float] = {
        "sparsity": plan.units["sparsity"],
        "count": float(plan.units["removed"]),
        "params": after.params / max(before.params, 1),
        "memory_bytes": float(after.size_bytes),
    }
    # A model without a counted operation, an embedding alone for example, has no share of 0 MACs.
    if before.macs and after.macs is not None:
        found["macs"] = after.macs / before.macs
    if after.latency_ms is not None:
        found["latency_ms"] = after.latency_ms.median
    if plan.request.target is None:
        return None
    target = plan.request.target
    asked = target.numbers()
    # Scores below a threshold go, whatever comes of that: it is met by definition.
    found |= {name: value for name, value in asked.items() if name == "threshold"}
    # Every other target was counted when the plan was made. Time alone is not the plan's to promise: the machine that
    # measures at the end may be busier than it was then.
    missed = found.get("latency_ms", 0.0) > asked.get("latency_ms", math.inf)
    return Goal(target.flat(), {name: found[name] for name in target.given() if name in found}, missed)


def _limited(goal: Goal | None, limit: Limit | None) -> Goal | None:
    """The goal with the loss that was allowed, beside the amount that was found for it."""
    if limit is None:
        return goal
    goal = goal or Goal()
    reached = {} if limit.test is None else {"max_drop": limit.test.drop}
    return Goal(
        {**goal.target, "max_drop": limit.max_drop},
        {**goal.achieved, **reached},
        goal.missed or limit.verdict == "missed",
        limit,
    )


def _choice(named: Named) -> Choice:
    # By way of JSON, since requests may hold tuples where files hold lists.
    return Choice(name=named.name, options=json.loads(canonical_json(named.options)))


def _granularity(request: Request) -> Choice:
    """One with its options, or several by their names: options of different kinds have no common meaning."""
    return _choice(request.granularity[0]) if len(request.granularity) == 1 else Choice(name=request.what)
