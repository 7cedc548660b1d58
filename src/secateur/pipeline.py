"""The story from top to bottom: look, decide, cut, prove, recover, measure, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from secateur.errors import InputError, RecipeError
from secateur.measure import quality, snapshot
from secateur.measure.pair import time_pair
from secateur.model.call import require_reiterable, to_example
from secateur.model.tensors import named_tensors, require_finite
from secateur.planning import Plan, make_plan
from secateur.recipe import Recipe, load_recipe
from secateur.recover.steps import Damage, recover
from secateur.report import TrainingPoint
from secateur.report.collect import collect, forecast
from secateur.report.journal import Journal, Progress
from secateur.result import Estimate, Result
from secateur.types import Data, Evaluate, Example, Loss

DEFAULT_RECIPE = "channel-half-macs"


def prune(
    model: nn.Module,
    example: Example = None,
    *,
    data: Data | None = None,
    recipe: Recipe | Mapping[str, object] | str | Path | None = None,
    overrides: Sequence[str] = (),
    calibration: Data | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    title: str = "",
    command: str = "",
) -> Result:
    """Prune a model by a recipe: plan, apply, certify, recover, measure.

    Args:
        model: any module; left as it is.
        example: forward inputs: a tensor, a tuple of positional or a mapping of keyword arguments. Taken from the
            first batch of `data` where it is left out.
        data: batches to recover with, and to score with where `calibration` is left out.
        recipe: a `Recipe`, a mapping, a bundled name or a YAML file; default "channel-half-macs".
        overrides: "key.sub=value" settings on top of the recipe.
        calibration: batches for statistics and scores.
        loss: ``loss(model, batch) -> scalar``; default from the batches.
        evaluate: ``evaluate(model) -> float or mapping`` for quality before and after.
        progress: called as ``progress(stage, done, total)``; total 0 = not known.
        title: what the report calls the run; the model's class by default.
        command: the command line that reproduces it.

    Returns:
        the pruned model, its plan with certificate, and the report.

    Raises:
        RecipeError: the recipe is wrong.
        InputError: no data where a step needs it, NaN or Inf in weights, activations or loss.
        UnsupportedError: the model cannot be captured, or nothing can be cut.
        TargetError: the target cannot be reached.
    """
    settings = load_recipe(DEFAULT_RECIPE if recipe is None else recipe, overrides)
    _check(model, data, settings)
    example = _example(example, data)
    scoring = data if calibration is None else calibration
    run = Journal(progress)
    with run.stage("plan"), run.noticed():
        # Before the plan, since a model whose outputs are not finite has nothing that could be kept.
        before = snapshot(model, example, evaluate=evaluate)
        plan = plan_by(model, example, settings, scoring, loss)
    with run.stage("apply"):
        pruned = plan.apply(model)
    with run.stage("quality"):
        # What the cut alone did; without recovery it is the final quality, which is measured below.
        after_cut = quality(pruned, evaluate) if evaluate is not None and settings.recover else None
    for number, step in enumerate(settings.recover):
        with run.stage(f"recover {number + 1}: {step.method}"):
            assert data is not None
            assert scoring is not None
            records = recover(
                pruned,
                step.model_dump(exclude_none=True),
                Damage(model, plan.cuts, plan.masks, plan.layers),
                train=data,
                scoring=scoring,
                loss=loss,
                seed=settings.seed,
                progress=run.step(step.method),
            )
            run.training += [TrainingPoint(step=r.step, loss=r.loss, lr=r.lr) for r in records]
    with run.stage("measure"):
        # Timed in the same rounds and at the end, so that a machine that got busy meanwhile slows both alike.
        timed = time_pair(model, pruned, example, settings.measure, zeros_only=bool(plan.masks))
        before = replace(before, latency_ms=timed[0])
        after = snapshot(pruned, example, evaluate=evaluate, latency_ms=timed[1])
    with run.stage("report"):
        report = collect(
            model, plan, settings, before=before, after=after, after_cut=after_cut, run=run, title=title,
            command=command,
        )  # fmt: skip
    return Result(pruned, plan, report, settings, tuple(run.degradations), tuple(run.log))


def estimate(
    model: nn.Module,
    example: Example = None,
    *,
    data: Data | None = None,
    recipe: Recipe | Mapping[str, object] | str | Path | None = None,
    overrides: Sequence[str] = (),
    loss: Loss | None = None,
    progress: Progress | None = None,
    title: str = "",
) -> Estimate:
    """Say what pruning by a recipe would bring: plan, apply to a copy, certify, count and time. Nothing is recovered.

    Args:
        model: any module; left as it is.
        example: forward inputs, as for `prune`. Taken from the first batch of `data` where it is left out.
        data: batches to score with, where the criterion needs any.
        recipe: as for `prune`; its recovery steps are left out.
        overrides: "key.sub=value" settings on top of the recipe.
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
    settings = load_recipe(DEFAULT_RECIPE if recipe is None else recipe, overrides)
    _check_weights(model)
    example = _example(example, data)
    run = Journal(progress)
    with run.stage("plan"):
        before = snapshot(model, example)
        plan = plan_by(model, example, settings, data, loss)
    with run.stage("apply to a copy"):
        smaller = plan.apply(model)
    with run.stage("measure"):
        timed = time_pair(model, smaller, example, settings.measure, zeros_only=bool(plan.masks))
        before = replace(before, latency_ms=timed[0])
        after = snapshot(smaller, example, latency_ms=timed[1])
    return Estimate(plan, forecast(model, plan, settings, before=before, after=after, title=title))


def _check(model: nn.Module, data: Data | None, recipe: Recipe) -> None:
    _check_weights(model)
    if recipe.recover and data is None:
        raise RecipeError("The recipe recovers, which needs data.", hint="Pass data, or set recover to [].")
    if recipe.recover and data is not None:
        require_reiterable(data, "it is read for scoring, for recovery and for every epoch")


def _check_weights(model: nn.Module) -> None:
    # A NaN would be pruned or kept by chance: comparisons with it are false whichever way they are written.
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            require_finite(tensor, name, what="parameter")


def _example(example: Example, data: Data | None) -> Example:
    if example is not None:
        return example
    if data is None:
        raise InputError(
            "There is neither an example nor data to take one from.",
            hint="Pass example=the inputs of one forward pass.",
        )
    # Taking the first batch of something that can be read once would leave it out of the scores.
    require_reiterable(data, "its first batch serves as the example")
    for batch in data:
        return to_example(batch)
    raise InputError("The data holds no batch.", hint="Pass data with at least one batch.")


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
