"""The story from top to bottom: look, decide, cut, prove, recover, measure, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import InputError, RecipeError
from secateur.measure import quality, snapshot
from secateur.model.call import require_reiterable, to_example
from secateur.model.tensors import named_tensors, require_finite
from secateur.planning import Plan, make_plan
from secateur.recipe import Recipe, load_recipe
from secateur.recover.steps import Damage, recover
from secateur.report import TrainingPoint
from secateur.report.collect import collect, time_both, with_latency
from secateur.report.journal import Journal, Progress
from secateur.result import Result
from secateur.types import Data, Evaluate, Example, Loss


def prune(
    model: nn.Module,
    example: Example = None,
    *,
    data: Data | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
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
        title: what the report calls the run.
        command: the command line that reproduces it.

    Returns:
        the pruned model, its plan with certificate, and the report.

    Raises:
        RecipeError: the recipe is wrong.
        InputError: no data where a step needs it, NaN or Inf in weights, activations or loss.
        UnsupportedError: the model cannot be captured, or nothing can be cut.
        TargetError: the target cannot be reached.
    """
    settings = load_recipe("channel-half-macs" if recipe is None else recipe, overrides)
    _check(model, data, settings)
    example = _example(example, data)
    run = Journal(progress)
    with run.stage("plan"), run.noticed():
        before = snapshot(model, example, evaluate=evaluate)
        plan = plan_by(model, example, settings, data if calibration is None else calibration, loss)
    with run.stage("apply"):
        pruned = plan.apply(model)
    with run.stage("quality"):
        after_cut = quality(pruned, evaluate) if evaluate is not None and settings.recover else None
    training: list[TrainingPoint] = []
    for number, step in enumerate(settings.recover):
        with run.stage(f"recover {number + 1}: {step.method}"):
            assert data is not None
            records = recover(
                pruned,
                step.model_dump(exclude_none=True),
                Damage(model, plan.cuts, plan.masks, plan.layers),
                train=data,
                scoring=calibration or data,
                loss=loss,
                seed=settings.seed,
                progress=run.step(step.method),
            )
            training += [TrainingPoint(step=r.step, loss=r.loss, lr=r.lr) for r in records]
    with run.stage("measure"):
        timed = time_both(model, pruned, example, settings, run.step("latency"))
        after = snapshot(pruned, example, evaluate=evaluate, latency_ms=timed.get("after"))
        before = with_latency(before, timed.get("before"))
    with run.stage("report"):
        record = collect(
            model, plan, before, after, settings, after_cut=after_cut, training=training, run=run,
            title=title or type(model).__name__, command=command,
        )  # fmt: skip
    return Result(pruned, plan, record, settings, tuple(run.degradations), tuple(run.log))


def _check(model: nn.Module, data: Data | None, recipe: Recipe) -> None:
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            require_finite(tensor, name, what="parameter")
    if recipe.recover and data is None:
        raise RecipeError("The recipe recovers, which needs data.", hint="Pass data, or set recover to [].")
    if recipe.recover and data is not None:
        require_reiterable(data, "it is read for scoring, for recovery and for every epoch")


def _example(example: Example, data: Data | None) -> Any:
    if example is not None:
        return example
    if data is None:
        raise InputError("prune() needs an example or data.", hint="Pass example=the inputs of one forward pass.")
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
        round_to=recipe.round_to,
        expressible=recipe.expressible,
        seed=recipe.seed,
        dtype=recipe.verify.dtype,
        tolerance=recipe.verify.tolerance,
    )
