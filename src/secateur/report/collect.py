"""What the report of a run says, collected from the plan, the two snapshots and the journal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.measure import latency
from secateur.model.call import device_of
from secateur.model.tensors import named_tensors
from secateur.planning import Plan
from secateur.planning.plan import fingerprint
from secateur.recipe import Recipe
from secateur.report.build import build, environment
from secateur.report.histogram import histogram, near_zero
from secateur.report.journal import Journal, Step
from secateur.report.record import Choice, Layer, Locked, Record, TrainingPoint, Units
from secateur.types import Example, Snapshot


def time_both(model: nn.Module, pruned: nn.Module, example: Example, recipe: Recipe, progress: Step) -> dict[str, Any]:
    """Latency of the model before and after in one call, as the recipe asks for it; empty where it does not."""
    wanted = recipe.measure
    if not wanted.latency:
        return {}
    progress(0, 0)
    models = {"before": model, "after": pruned}
    return latency(
        models,
        example,
        rounds=wanted.rounds,
        warmup=wanted.warmup,
        threads=wanted.threads,
        batch_size=wanted.batch_size,
    )


def with_latency(state: Snapshot, timed: Any) -> Snapshot:
    """The same snapshot with a latency: before and after are timed together, when both are there."""
    return Snapshot(state.params, state.nonzero, state.macs, state.size_bytes, timed, state.quality)


def collect(
    model: nn.Module,
    plan: Plan,
    before: Snapshot,
    after: Snapshot,
    recipe: Recipe,
    *,
    after_cut: Mapping[str, float] | None,
    training: Sequence[TrainingPoint],
    run: Journal,
    title: str,
    command: str,
) -> Record:
    """The record of a finished run.

    Args:
        model: as it came.
        plan: what was decided, certified where something was cut.
        before: the model as it came, measured.
        after: the model as it goes, measured.
        recipe: as it was resolved.
        after_cut: quality right after the cut, before any recovery.
        training: logged steps of recovery.
        run: stages, fallbacks and doubts.
        title: what the report calls the run.
        command: the command line that reproduces it.

    Returns:
        A validated record.

    Cost: a few passes over the weights, for their histograms.
    """
    cut = not plan.masks
    achieved = _achieved(plan, before, after, recipe)
    plain = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    return build(
        title,
        before=before,
        after=after,
        applied="cut" if cut else "mask",
        units=Units(removed=plan.units["removed"], total=plan.units["total"], what=f"{plan.units['what']} units"),
        criterion=_choice(plan.request["criterion"]),
        granularity=_choice(plan.request["granularity"]),
        scope=recipe.scope,
        allocation=_choice(plan.request["allocation"]),
        environment=environment(device=str(device_of(model)), seed=recipe.seed),
        fingerprint=fingerprint(model),
        certificate=plan.certificate,
        certificate_reason="" if plan.certificate else "zeros were written; no slice was cut",
        target=recipe.target.given(),
        achieved=achieved,
        target_missed=achieved.get("latency_ms", 0.0) > (recipe.target.latency_ms or math.inf),
        after_cut_quality=after_cut,
        degradations=run.degradations,
        seconds=run.seconds,
        layers=list(_layers(model, plan)),
        locked=list(_locked(model, plan)),
        training=training,
        warnings=run.doubts,
        command=command,
        recipe=plain,
    )


def _choice(value: Any) -> Choice:
    if isinstance(value, str):
        return Choice(name=value)
    return Choice(name=str(value["name"]), options={k: v for k, v in value.items() if k != "name"})


def _achieved(plan: Plan, before: Snapshot, after: Snapshot, recipe: Recipe) -> dict[str, float]:
    found: dict[str, float] = {
        "sparsity": plan.units["sparsity"],
        "count": float(plan.units["removed"]),
        "params": after.params / max(before.params, 1),
        "memory_bytes": float(after.size_bytes),
    }
    if before.macs and after.macs is not None:
        found["macs"] = after.macs / before.macs
    if after.latency_ms is not None:
        found["latency_ms"] = after.latency_ms.median
    if recipe.target.threshold is not None:
        found["threshold"] = recipe.target.threshold
    return {name: found[name] for name in recipe.target.given() if name in found}


def _layers(model: nn.Module, plan: Plan) -> Iterator[Layer]:
    known = plan.evidence
    assert known is not None
    tensors = named_tensors(model)
    if plan.layers:
        yield from _stacks(model, plan)
        return
    for group in known.groups:
        span = next((s for s in group.spans if s.role in ("out", "self")), group.spans[0])
        weight, keep = tensors[span.tensor], known.keep[group.name]
        after = _size_after(weight, plan.cuts.get(span.tensor, {}))
        yield Layer.measure(group.name, weight, params_after=after, scores=known.scores[group.name], keep=keep)


def _size_after(weight: Tensor, cuts: Mapping[int, Tensor]) -> int:
    """Elements that a tensor keeps: along a dimension that is not cut, all of them."""
    return math.prod(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(weight.shape))


def _stacks(model: nn.Module, plan: Plan) -> Iterator[Layer]:
    """One row for each stack of blocks: its parameters are those of all its blocks."""
    known = plan.evidence
    assert known is not None
    for name, stack in plan.layers.items():
        blocks = [list(model.get_submodule(f"{name}.{i}").parameters()) for i in range(stack["size"])]
        sizes = [sum(p.numel() for p in block) for block in blocks]
        everything = [p for block in blocks for p in block]
        near = sum(near_zero(p) * p.numel() for p in everything) / max(sum(sizes), 1)
        gone = len(stack["removed"])
        yield Layer(
            name=name,
            shape=(stack["size"],),
            params_before=sum(sizes),
            params_after=sum(size for i, size in enumerate(sizes) if i not in stack["removed"]),
            removed=gone,
            total=stack["size"],
            sparsity=gone / stack["size"],
            near_zero=near,
            score_histogram=histogram(known.scores[name]) if name in known.scores else None,
        )


def _locked(model: nn.Module, plan: Plan) -> Iterator[Locked]:
    known = plan.evidence
    if known is None or known.structure is None:
        return
    tensors = named_tensors(model)
    for group in known.structure.groups:
        if group.locks:
            params = sum(tensors[s.tensor].numel() for s in group.spans if s.role == "out")
            yield Locked.of(group.name, group.locks[0], params=params)
