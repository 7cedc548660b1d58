"""The story from top to bottom: look, decide, cut, prove, recover, measure, report."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import report
from secateur.criteria import StationaryWarning
from secateur.errors import RecipeError
from secateur.measure import Yardstick, latency, snapshot, yardstick
from secateur.measure.macs import samples_in
from secateur.model.call import device_of
from secateur.model.door import Given, Parts, enter
from secateur.model.tensors import named_tensors, require_finite
from secateur.planning import Plan, make_plan
from secateur.planning.decision import fingerprint
from secateur.recipe import Recipe, load_recipe
from secateur.recover.steps import Damage, dense_control, recover
from secateur.request import Target
from secateur.result import Result
from secateur.statistics.notes import CurvatureWarning
from secateur.types import Data, Degradation, Example, Judge, Latency, Loss, Snapshot

Progress = Callable[[str, int, int], None]
Step = Callable[[int, int], None]


def prune(
    model: nn.Module,
    example: Example = None,
    *,
    data: Given | None = None,
    recipe: Recipe | Mapping[str, object] | str | Path | None = None,
    overrides: Sequence[str] = (),
    calibration: Data | None = None,
    test: Data | None = None,
    loss: Loss | None = None,
    evaluate: Judge | None = None,
    progress: Progress | None = None,
    title: str = "",
    command: str = "",
) -> Result:
    """Prune a model by a recipe: plan, apply, certify, recover, measure.

    Args:
        model: any module; left as it is.
        example: forward inputs: a tensor, a tuple of positional or a mapping of keyword arguments. Taken from the
            first batch of `data` where it is left out.
        data: batches to recover with, and to score with where `calibration` is left out; or a mapping of train,
            calibration and test, or a `secateur.sources.DataSet`. Whatever is given is read several times.
        recipe: a `Recipe`, a mapping, a bundled name or a YAML file; default "channel-half-macs".
        overrides: "key.sub=value" settings on top of the recipe.
        calibration: batches for statistics and scores.
        test: batches for quality, which nothing else reads. Without them quality is measured on training data, and
            the report says so.
        loss: ``loss(model, batch) -> scalar``; default from the batches.
        evaluate: how quality is measured before and after: ``evaluate(model) -> float or mapping``, a metric with
            update, compute and reset (as torchmetrics has), or a mapping of names to such. Default by the labels:
            accuracy for classes, "mse" for a regression, "loss" for a model with a loss of its own or for `loss`.
        progress: called as ``progress(stage, done, total)``; total 0 = not known.
        title: what the report calls the run.
        command: the command line that reproduces it.

    Returns:
        the pruned model, its plan with certificate, and the report.

    Raises:
        RecipeError: the recipe is wrong.
        InputError: no data where a step needs it, data that can be read only once, NaN or Inf in weights,
            activations or loss.
        UnsupportedError: the model cannot be captured, or nothing can be cut.
        TargetError: the target cannot be reached.
    """
    settings = load_recipe("channel-half-macs" if recipe is None else recipe, overrides)
    # Everything that the arguments alone can tell is refused here, before the first forward pass.
    given = enter(data, calibration=calibration, test=test)
    _check(model, given, settings)
    example = given.example() if example is None else example
    run = _Run(progress, given.notes)
    with run.stage("plan"), run.noticed():
        # Decided once, on the model as it came: a ratio of two counts needs one divisor.
        samples = samples_in(model, example)
        judged = _yardstick(model, given, settings, evaluate, loss)
        before = snapshot(model, example, evaluate=judged.evaluate, samples=samples)
        plan = plan_by(model, example, settings, given.scoring, loss)
    with run.stage("apply"):
        pruned = plan.apply(model)
    # Between cut and recovery, so that the report can say which of the two brought what.
    with run.stage("quality"):
        after_cut = judged.evaluate(pruned) if judged.evaluate is not None and settings.recover else None
    training: list[report.TrainingPoint] = []
    for number, step in enumerate(settings.recover):
        with run.stage(f"recover {number + 1}: {step.method}"):
            assert given.train is not None
            assert given.scoring is not None
            records = recover(
                pruned,
                step,
                Damage(model, plan.cuts, plan.masks, plan.layers),
                train=given.train,
                scoring=given.scoring,
                loss=loss,
                seed=settings.seed,
                progress=run.step(step.method),
            )
            training += [report.TrainingPoint(step=r.step, loss=r.loss, lr=r.lr) for r in records]
    control = _control(model, given, settings, judged, loss, run) if settings.control == "dense" else None
    with run.stage("measure"):
        # Both here and in turns: a machine changes its speed within a run.
        timed = _latency(model, pruned, example, settings, run.step("latency"))
        after = snapshot(pruned, example, evaluate=judged.evaluate, latency_ms=timed.get("after"), samples=samples)
        before = _with_latency(before, timed.get("before"))
    with run.stage("report"):
        record = _report(
            model, plan, before, after, settings, after_cut=after_cut, training=training, run=run,
            judged=judged, control=control, title=title or type(model).__name__, command=command,
        )  # fmt: skip
    return Result(pruned, plan, record, settings, tuple(run.degradations), tuple(run.log))


class _Run:
    """Times the stages, keeps the log, passes progress on."""

    def __init__(self, progress: Progress | None, doubts: Sequence[str] = ()) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.log: list[dict[str, str | float]] = []
        self.degradations: list[Degradation] = []
        self.doubts: list[str] = list(doubts)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        if self.progress is not None:
            self.progress(name, 0, 0)
        yield
        self.seconds[name] = round(time.perf_counter() - started, 4)
        self.log.append({"stage": name, "seconds": self.seconds[name]})

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Criteria warn of fallbacks, which degrade the run, and of doubts, which the report repeats."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for one in caught:
            if issubclass(one.category, CurvatureWarning):
                self.degradations.append(Degradation("score", str(one.message)))
            elif issubclass(one.category, StationaryWarning):
                self.doubts.append(str(one.message))
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def step(self, name: str) -> Step:
        def report_step(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total)

        return report_step


def _check(model: nn.Module, given: Parts, recipe: Recipe) -> None:
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            require_finite(tensor, name, what="parameter")
    if recipe.recover and given.train is None:
        raise RecipeError("The recipe recovers, which needs data.", hint="Pass data, or set recover to [].")


def _yardstick(model: nn.Module, given: Parts, recipe: Recipe, judge: Judge | None, loss: Loss | None) -> Yardstick:
    if not recipe.measure.quality:
        return Yardstick(None, why="not asked for: measure.quality is false")
    found = yardstick(model, given, judge, loss=loss)
    # Said before hours are spent on a copy whose only use is to be measured.
    if found.evaluate is None and recipe.control == "dense":
        raise RecipeError(
            "control: dense needs a figure of quality, and there is none.",
            why=found.why,
            hint="Pass evaluate=, or batches with targets; or leave the control out.",
        )
    return found


def _control(
    model: nn.Module, given: Parts, recipe: Recipe, judged: Yardstick, loss: Loss | None, run: _Run
) -> report.Control:
    """The original after the same steps, and its quality on the same samples."""
    assert given.train is not None
    assert judged.evaluate is not None
    with run.stage("control: dense"):
        trained, steps = dense_control(
            model,
            recipe.recover,
            train=given.train,
            loss=loss,
            seed=recipe.seed,
            progress=run.step("control: dense"),
        )
        return report.Control(steps=steps, quality=judged.evaluate(trained))


def plan_by(
    model: nn.Module, example: Example, recipe: Recipe, data: Data | None = None, loss: Loss | None = None
) -> Plan:
    """The plan that a recipe asks for; nothing is changed. See `secateur.planning.make_plan`."""
    plain = recipe.model_dump(by_alias=True)
    return make_plan(
        model,
        example,
        target=recipe.target.given(),
        criterion=plain["criterion"],
        granularity=plain["granularity"],
        data=data,
        loss=loss,
        scope=recipe.scope,
        allocation=plain["allocation"] if isinstance(plain["allocation"], str) else plain["allocation"]["name"],
        protect=recipe.protect,
        min_keep=recipe.min_keep,
        min_keep_fraction=recipe.min_keep_fraction,
        round_to=recipe.round_to,
        expressible=recipe.expressible,
        seed=recipe.seed,
        dtype=recipe.verify.dtype,
        tolerance=recipe.verify.tolerance,
    )


def _latency(
    model: nn.Module, pruned: nn.Module, example: Example, recipe: Recipe, progress: Step
) -> dict[str, Latency]:
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


def _with_latency(state: Snapshot, timed: Latency | None) -> Snapshot:
    return replace(state, latency_ms=timed)


def _report(
    model: nn.Module,
    plan: Plan,
    before: Snapshot,
    after: Snapshot,
    recipe: Recipe,
    *,
    after_cut: Mapping[str, float] | None,
    training: Sequence[report.TrainingPoint],
    run: _Run,
    judged: Yardstick,
    control: report.Control | None,
    title: str,
    command: str,
) -> report.Record:
    cut = not plan.masks
    achieved = _achieved(plan, before, after, recipe)
    plain = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    return report.build(
        title,
        before=before,
        after=after,
        applied="cut" if cut else "mask",
        units=report.Units(
            removed=plan.units["removed"], total=plan.units["total"], what=f"{plan.units['what']} units"
        ),
        criterion=_choice(plan.request.criterion.spec()),
        granularity=_choice(plan.request.what),
        scope=recipe.scope,
        allocation=_choice(plan.request.allocation),
        environment=report.environment(device=str(device_of(model)), seed=recipe.seed),
        fingerprint=fingerprint(model),
        certificate=plan.certificate,
        certificate_reason="" if plan.certificate else "zeros were written; no slice was cut",
        target=Target.of(recipe.target.given()).flat(),
        achieved=achieved,
        target_missed=achieved.get("latency_ms", 0.0) > (recipe.target.latency_ms or math.inf),
        after_cut_quality=after_cut,
        quality_on=judged.on,
        quality_missing=judged.why,
        control=control,
        degradations=run.degradations,
        seconds=run.seconds,
        layers=list(_layers(model, plan)),
        locked=list(_locked(model, plan)),
        training=training,
        warnings=run.doubts,
        command=command,
        recipe=plain,
    )


def _choice(value: Any) -> report.Choice:
    if isinstance(value, str):
        return report.Choice(name=value)
    return report.Choice(name=str(value["name"]), options={k: v for k, v in value.items() if k != "name"})


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


def _layers(model: nn.Module, plan: Plan) -> Iterator[report.Layer]:
    known = plan.evidence
    assert known is not None
    tensors = named_tensors(model)
    if plan.layers:
        yield from _stacks(model, plan)
        return
    for group in known.groups:
        span = next((s for s in group.spans if s.role in ("out", "self")), group.spans[0])
        weight, keep = tensors[span.tensor], known.keep[group.name]
        after = torch.Size(
            len(plan.cuts.get(span.tensor, {}).get(d, range(n))) for d, n in enumerate(weight.shape)
        ).numel()
        yield report.Layer.measure(group.name, weight, params_after=after, scores=known.scores[group.name], keep=keep)


def _stacks(model: nn.Module, plan: Plan) -> Iterator[report.Layer]:
    """One row for each stack of blocks: its parameters are those of all its blocks."""
    known = plan.evidence
    assert known is not None
    for name, stack in plan.layers.items():
        blocks = [list(model.get_submodule(f"{name}.{i}").parameters()) for i in range(stack["size"])]
        sizes = [sum(p.numel() for p in block) for block in blocks]
        everything = [p for block in blocks for p in block]
        near = sum(report.near_zero(p) * p.numel() for p in everything) / max(sum(sizes), 1)
        gone = len(stack["removed"])
        yield report.Layer(
            name=name,
            shape=(stack["size"],),
            params_before=sum(sizes),
            params_after=sum(size for i, size in enumerate(sizes) if i not in stack["removed"]),
            removed=gone,
            total=stack["size"],
            sparsity=gone / stack["size"],
            near_zero=near,
            score_histogram=report.histogram(known.scores[name]) if name in known.scores else None,
        )


def _locked(model: nn.Module, plan: Plan) -> Iterator[report.Locked]:
    known = plan.evidence
    if known is None or known.structure is None:
        return
    tensors = named_tensors(model)
    for group in known.structure.groups:
        if group.locks:
            params = sum(tensors[s.tensor].numel() for s in group.spans if s.role == "out")
            yield report.Locked.of(group.name, group.locks[0], params=params)
