"""The story from top to bottom: look, decide, cut, prove, recover, measure, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from torch import nn

from secateur.criteria.base import Criterion
from secateur.errors import RecipeError
from secateur.kinds.weights.granularity import Granularity
from secateur.loading import doubt
from secateur.measure import Yardstick, snapshot, yardstick
from secateur.measure.macs import samples_in
from secateur.measure.pair import time_pair
from secateur.model.admit import about_wrapper, admit
from secateur.model.call import several
from secateur.model.door import Given, Parts, enter
from secateur.model.tensors import named_tensors, require_finite
from secateur.planning import Plan, make_plan
from secateur.planning.build import CriterionLike, GranularityLike
from secateur.recipe import Recipe, load_recipe
from secateur.recover.steps import Damage, dense_control, recover
from secateur.report import Control, TrainingPoint
from secateur.report.collect import collect, forecast
from secateur.report.journal import Journal, Progress
from secateur.request import Amount, Target
from secateur.result import Estimate, Result
from secateur.types import Data, Example, Judge, Loss

DEFAULT_RECIPE = "channel-half-macs"


class Decided(TypedDict, total=False):
    """What `secateur.plan` can be told about what goes; see there."""

    target: Target | Mapping[str, Amount]
    criterion: CriterionLike
    granularity: GranularityLike
    scope: str
    allocation: str
    protect: Sequence[str]
    min_keep: int
    min_keep_fraction: float
    round_to: int | Literal["auto"] | None
    seed: int
    dtype: str
    tolerance: float | None
    expressible: bool
    scales: str


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
    examples: Sequence[Example] = (),
    **decision: Unpack[Decided],
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
        title: what the report calls the run; the model's class by default.
        command: the command line that reproduces it.
        examples: several examples, in the place of `example` or beside it: the plan and its certificate hold for all.
        **decision: what goes, with the keywords of `secateur.plan`: target, criterion, granularity, scope, allocation,
            protect, min_keep, min_keep_fraction, round_to, seed, dtype, tolerance, expressible, scales. They take the
            place of the recipe's; a recipe is for what comes after: recovery, measuring.

    Returns:
        the pruned model, its plan with certificate, and the report.

    Raises:
        RecipeError: the recipe is wrong.
        InputError: no data where a step needs it, data that can be read only once, NaN or Inf in weights,
            activations or loss.
        UnsupportedError: the model is of a kind that cannot be pruned (quantised, scripted, sharded ...), cannot be
            captured or copied, or nothing can be cut.
        TargetError: the target cannot be reached.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> result = prune(model, torch.ones(1, 8), target={"sparsity": 0.5}, overrides=["measure.latency=false"])
        >>> result.plan.units["removed"], result.report.after.params
        (8, 90)
    """
    came, model = model, admit(model, copied=True)
    given = enter(data, calibration=calibration, test=test)
    settings, untrained = _settings(recipe, overrides, decision, given)
    _check(model, given, settings)
    example, examples = several(example, examples)
    example = given.example() if example is None else example
    run = Journal(progress, given.notes)
    run.doubts += [*untrained, *([] if came is model else [about_wrapper(came)])]
    # A loaded model may bring a cut that nobody has proved here: what follows stands on it.
    run.doubts += [said for said in (doubt(model),) if said]
    with run.stage("plan"), run.noticed():
        # Decided once, on the model as it came: a ratio of two counts needs one divisor.
        samples = samples_in(model, example)
        judged = _yardstick(model, given, settings, evaluate, loss)
        # Before the plan, since a model whose outputs are not finite has nothing that could be kept.
        before = snapshot(model, example, evaluate=judged.evaluate, samples=samples)
        plan = plan_by(model, example, settings, given.scoring, loss, decision.get("criterion"), examples)
    with run.stage("apply"):
        pruned = plan.apply(model)
    # Between cut and recovery, so that the report can say which of the two brought what.
    with run.stage("quality"):
        # What the cut alone did; without recovery it is the final quality, which is measured below.
        after_cut = judged.evaluate(pruned) if judged.evaluate is not None and settings.recover else None
    _recover(pruned, Damage(model, plan.cuts, plan.masks, plan.layers), given, settings, loss, run)
    control = _control(model, given, settings, judged, loss, run) if settings.control == "dense" else None
    with run.stage("measure"):
        # Timed in the same rounds and at the end, so that a machine that got busy meanwhile slows both alike.
        timed = time_pair(model, pruned, example, settings.measure, zeros_only=bool(plan.masks))
        before = replace(before, latency_ms=timed[0])
        after = snapshot(pruned, example, evaluate=judged.evaluate, latency_ms=timed[1], samples=samples)
    with run.stage("report"):
        report = collect(
            model, plan, settings, before=before, after=after, after_cut=after_cut, judged=judged, control=control,
            run=run, title=title, command=command,
        )  # fmt: skip
    return Result(pruned, plan, report, settings, report.degradations, tuple(run.log))


def estimate(
    model: nn.Module,
    example: Example = None,
    *,
    data: Given | None = None,
    recipe: Recipe | Mapping[str, object] | str | Path | None = None,
    overrides: Sequence[str] = (),
    calibration: Data | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
    title: str = "",
) -> Estimate:
    """Say what pruning by a recipe would bring: plan, apply to a copy, certify, count and time. Nothing is recovered.

    Args:
        model: any module; left as it is.
        example: forward inputs, as for `prune`. Taken from the first batch of `data` where it is left out.
        data: batches to score with, where the criterion needs any, or the parts of the data as for `prune`.
        recipe: as for `prune`; its recovery steps are left out.
        overrides: "key.sub=value" settings on top of the recipe.
        calibration: batches for statistics and scores.
        loss: ``loss(model, batch) -> scalar``; default from the batches.
        progress: called as ``progress(stage, done, total)``; total 0 = not known.
        title: what the report calls the model; its class by default.

    Returns:
        The plan with its certificate, and a report of what it would bring: parameters, MACs, bytes and latency. Quality
        is not predicted.

    Raises:
        RecipeError: the recipe is wrong.
        InputError: no example, or no data where the criterion needs them; NaN or Inf in weights or activations.
        UnsupportedError: the model cannot be captured, or nothing can be cut.
        TargetError: the target cannot be reached.

    Cost: as `prune` without recovery; one copy of what would be kept.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> told = estimate(model, torch.ones(1, 8), recipe={"target": {"sparsity": 0.5}})
        >>> told.report.before.params, told.report.after.params
        (178, 90)
    """
    model = admit(model, copied=True)
    settings = load_recipe(DEFAULT_RECIPE if recipe is None else recipe, overrides)
    given = enter(data, calibration=calibration)
    _check_weights(model)
    example = given.example() if example is None else example
    run = Journal(progress)
    with run.stage("plan"):
        samples = samples_in(model, example)
        before = snapshot(model, example, samples=samples)
        plan = plan_by(model, example, settings, given.scoring, loss)
    with run.stage("apply to a copy"):
        smaller = plan.apply(model)
    with run.stage("measure"):
        timed = time_pair(model, smaller, example, settings.measure, zeros_only=bool(plan.masks))
        before = replace(before, latency_ms=timed[0])
        after = snapshot(smaller, example, latency_ms=timed[1], samples=samples)
    return Estimate(plan, forecast(model, plan, settings, before=before, after=after, title=title))


def _settings(
    recipe: Recipe | Mapping[str, object] | str | Path | None, overrides: Sequence[str], decision: Decided, given: Parts
) -> tuple[Recipe, list[str]]:
    """The recipe with what the keywords decide in its place, and what is left out of it for want of data."""
    settings = load_recipe(DEFAULT_RECIPE if recipe is None else recipe, overrides)
    plain = settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    for name, value in decision.items():
        if name in ("dtype", "tolerance"):
            plain["verify"][name] = value
        else:
            plain[name] = _plain(value)
    left_out = []
    # Somebody who asks for a recipe gets what it says or an error; the default's recovery is only what is usual.
    if recipe is None and settings.recover and given.train is None:
        plain["recover"] = []
        left_out.append("Nothing was recovered: no data were given to recover with.")
    return load_recipe(plain), left_out


def _plain(value: object) -> object:
    """A keyword of `plan` as a recipe writes it."""
    if isinstance(value, (Criterion, Granularity)):
        return {"name": value.name, **value.options()}
    if isinstance(value, Target):
        return value.given()
    return list(value) if isinstance(value, tuple) else value


def _check(model: nn.Module, given: Parts, recipe: Recipe) -> None:
    _check_weights(model)
    if recipe.recover and given.train is None:
        raise RecipeError("The recipe recovers, which needs data.", hint="Pass data, or set recover to [].")


def _check_weights(model: nn.Module) -> None:
    # A NaN would be pruned or kept by chance: comparisons with it are false whichever way they are written.
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            require_finite(tensor, name, what="parameter")


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


def _recover(pruned: nn.Module, damage: Damage, given: Parts, recipe: Recipe, loss: Loss | None, run: Journal) -> None:
    """Take the recipe's steps one after the other, each from what the one before left."""
    for number, step in enumerate(recipe.recover):
        with run.stage(f"recover {number + 1}: {step.method}"):
            assert given.train is not None
            assert given.scoring is not None
            records = recover(
                pruned,
                step,
                damage,
                train=given.train,
                scoring=given.scoring,
                loss=loss,
                seed=recipe.seed,
                progress=run.step(step.method),
            )
            run.training += [TrainingPoint(step=r.step, loss=r.loss, lr=r.lr) for r in records]


def _control(
    model: nn.Module, given: Parts, recipe: Recipe, judged: Yardstick, loss: Loss | None, run: Journal
) -> Control:
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
        return Control(steps=steps, quality=judged.evaluate(trained))


def plan_by(
    model: nn.Module,
    example: Example,
    recipe: Recipe,
    data: Data | None = None,
    loss: Loss | None = None,
    criterion: CriterionLike | None = None,
    examples: Sequence[Example] = (),
) -> Plan:
    """The plan that a recipe asks for; nothing is changed. See `secateur.planning.make_plan`.

    Args:
        model: left as it is.
        example: what one forward takes.
        recipe: what is asked for.
        data: batches to score with.
        loss: of the batches.
        criterion: takes the place of the recipe's, which cannot hold an object that has seen a training.
        examples: further ones.
    """
    plain = recipe.model_dump(by_alias=True)
    return make_plan(
        model,
        example,
        target=recipe.target.given(),
        criterion=plain["criterion"] if criterion is None else criterion,
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
        scales=recipe.scales,
        seed=recipe.seed,
        dtype=recipe.verify.dtype,
        tolerance=recipe.verify.tolerance,
        examples=examples,
    )
