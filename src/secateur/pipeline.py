"""The story from top to bottom: look, decide, cut, prove, recover, measure, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Unpack

from torch import nn

from secateur.asking import EXACT, Asked, ByHand, Decided, by_hand, check_asked, plan_by, settings_of
from secateur.errors import RecipeError, SecateurError
from secateur.files.checkpoint import EVERY
from secateur.loading import doubt
from secateur.measure import Yardstick, snapshot, yardstick
from secateur.measure.macs import samples_in
from secateur.measure.pair import time_pair
from secateur.model.admit import about_wrapper, admit
from secateur.model.call import as_loss, several
from secateur.model.door import Given, enter
from secateur.model.protect import patterns_of
from secateur.model.tensors import require_finite_weights
from secateur.objective.at_most import confirmed, found_at_most
from secateur.objective.limits import CONFIDENCE, AtMost, Smallest, at_most_asked, require_data
from secateur.planning import Plan, make_plan
from secateur.planning.history import copy_to_go_on_with
from secateur.recipe import Recipe
from secateur.recover.damage import damage_of
from secateur.recover.during import Trained, as_asked, give
from secateur.recover.own import Train, require_loop
from secateur.report import Control
from secateur.report.collect import collect, forecast
from secateur.report.journal import Journal
from secateur.report.limit import UNCONFIRMED, limit_lines
from secateur.report.stage_progress import shows_progress
from secateur.report.trackers import Track
from secateur.result import Estimate, Result, native
from secateur.run_training import recorded, recover_all, train_first, trained_control, watch, with_trackers
from secateur.stages import RunStages, Unfinished, place_of
from secateur.types import Data, Degradation, Example, Judge, Loss, Progress, Snapshot
from secateur.words import spoken


@dataclass(frozen=True, eq=False)
class Seen:
    """The model as it came: samples in the example, how quality is measured, and its figures."""

    samples: int
    judged: Yardstick
    before: Snapshot


@spoken(Decided.__annotations__)
@shows_progress
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
    recover: str | Mapping[str, object] | Sequence[Mapping[str, object]] | None = None,
    train: Train | None = None,
    checkpoint: Unfinished | str | Path | None = None,
    every: float = EVERY,
    progress: Progress | bool | None = None,
    title: str = "",
    command: str = "",
    track: Track | Sequence[Track] = (),
    examples: Sequence[Example] = (),
    max_drop: float | None = None,
    smallest: Smallest | None = None,
    confidence: float = CONFIDENCE,
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
            update, compute and reset (as torchmetrics has), the name of one ("f1", "top5", "mae"; the library
            `evaluate` knows more), or a mapping of names to such. Default by the labels:
            accuracy for classes, "mse" for a regression, "loss" for a model with a loss of its own or for `loss`.
        recover: recovery steps in the place of the recipe's: a step, a list of them, or the name of a step without
            options that are needed ("bn_refresh", "refit").
        train: ``train(model)``, any loop of your own, after the recovery steps; the default recipe's own are left out.
            Masks are held through every step of whatever optimizers it makes.
        checkpoint: a folder in which the run keeps what it has done. The same call with the same folder (or
            `secateur.resume`) goes on after an interrupt, a kill or a crash, and ends with the same bytes.
            ``result.save`` removes it.
        every: seconds between two states of a training; the end of each stage is always kept.
        progress: True shows it (None: in a notebook only), or called as ``progress(stage, done, total)``; total 0 =
            not known.
        title: what the report calls the run; the model's class by default.
        command: the command line that reproduces it.
        track: trackers that log loss, sparsity, quality and the recipe: "tensorboard", "wandb", "mlflow", "trackio", a
            mapping of the name and options of accelerate's class, an `accelerate.tracking.GeneralTracker`, or several.
        examples: several examples, in the place of `example` or beside it: the plan and its certificate hold for all.
        max_drop: in the place of a target: the smallest model that loses at most so many points of a share (accuracy;
            1.0 = one hundredth), or percent of any other figure (a loss). Amounts are tried along one removal order,
            each with the recipe's recovery; see docs/how-to/at-most-this-loss.md.
        smallest: with max_drop, the target whose amount is found: "macs", "params", "sparsity" or "latency_ms".
        confidence: with max_drop, how sure the limit is to be kept on other samples than those that it is chosen by.
        **decision: what goes, with the keywords of `secateur.plan`: target, criterion, granularity, scope, allocation,
            protect, min_keep, min_keep_fraction, round_to, seed, dtype, tolerance, expressible, scales, proof, blocks.
            They take the place of the recipe's; a recipe is for what comes after: recovery, measuring. And what no
            recipe can hold: scores (with comparable), keep, remove or masks, which decide as they do there.

    Returns:
        the pruned model, its plan with certificate, and the report.

    Raises:
        RecipeError: the recipe is wrong.
        InputError: no data where a step needs it, data that can be read only once, NaN or Inf in weights,
            activations or loss.
        UnsupportedError: the model is of a kind that cannot be pruned (quantised, scripted, sharded ...), cannot be
            captured or copied, or nothing can be cut.
        TargetError: the target cannot be reached, or no amount is sure to keep max_drop.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> result = prune(model, torch.ones(1, 8), target={"sparsity": 0.5}, overrides=["measure.latency=false"])
        >>> result.plan.units["removed"], result.report.after.params
        (8, 90)
    """
    # Kept, to say in the report that a wrapper was taken off.
    came, model = model, admit(model, copied=True)
    given = enter(data, calibration=calibration, test=test)
    if "protect" in decision:
        decision["protect"] = patterns_of(model, decision["protect"])
    require_data(max_drop, given.train, given.calibration)
    loss = as_loss(loss)
    if train is not None:
        require_loop(train)
    wanted = at_most_asked(max_drop, smallest, confidence, decision)
    settings, untrained = settings_of(recipe, overrides, decision, given, recover=recover, own=train is not None)
    settings, objects = with_trackers(settings, track)
    units = by_hand(decision, settings)
    check_asked(model, given, settings)
    example, examples = several(example, examples)
    example = given.example() if example is None else example
    run = Journal(_called(progress), given.notes)
    run.doubts += [*untrained, *_doubts(came, model, units)]
    data = (given.train, given.scoring, given.test)
    kept = RunStages(place_of(checkpoint, every), model, settings, run, own=train is not None, given=units,
                     limit=None if wanted is None else wanted.to_data(), data=data)  # fmt: skip
    asked = Asked(
        model, example, examples, given, settings, decision.get("criterion"), units, loss, evaluate, train, title,
        command,
    )  # fmt: skip
    try:
        watch(run, settings, objects, kept.folder, title or type(model).__name__)
        return _staged(asked, run, kept, wanted)
    except SecateurError as error:
        kept.refused(error)
        raise
    finally:
        run.watched()
        kept.close()


def _staged(asked: Asked, run: Journal, kept: RunStages, wanted: AtMost | None = None) -> Result:
    """The stages of `prune`, each done once."""
    limit = None
    if wanted is not None:
        with run.stage("search"), run.noticed():
            asked, limit = found_at_most(asked, wanted, kept, run.step("search"))
        kept.stage_ended()
    settings, example = asked.settings, asked.example
    training = settings.training
    if training is None:
        with run.stage("plan"), run.noticed():
            seen = _look(asked, kept, run)
            base, plan, trained = asked.model, _decide(asked, asked.model, run, kept), None
        kept.stage_ended()
    else:
        with run.stage("look"), run.noticed():
            seen = _look(asked, kept, run)
        with run.stage(f"train: {training.method}"), run.noticed():
            trained = kept.trained(partial(train_first, asked, run), partial(recorded, run))
        with run.stage("plan"), run.noticed():
            base, plan = _decide_trained(asked, trained, run, kept)
        kept.stage_ended()
    run.doubts += plan.notes
    with run.stage("apply"), run.noticed():
        # Done again by a process that takes the run up: a module is no data, and a proof is of the model at hand.
        pruned = plan.apply(base)
        if training is not None and trained is not None and base is asked.model:
            give(pruned, trained, training.method)
    # Between cut and recovery, so that the report can say which of the two brought what.
    with run.stage("quality"):
        # What the cut alone did; without recovery it is the final quality, which is measured below.
        later = bool(settings.recover) or asked.train is not None
        after_cut = kept.once("cut", lambda: _quality(seen.judged, pruned)) if later else None
        run.figures("after the cut", after_cut)
    recover_all(asked, damage_of(base, plan, pruned), pruned, run, kept)
    control = None
    if settings.control == "dense":
        with run.stage("control: dense"):
            told = kept.once("control", lambda: trained_control(asked, seen.judged, run, kept))
            control = Control(steps=tuple(told["steps"]), quality=told["quality"])
    with run.stage("measure"):
        # Timed in the same rounds and at the end, so that a machine that got busy meanwhile slows both alike.
        timed = time_pair(asked.model, pruned, example, settings.measure, zeros_only=bool(plan.masks))
        before = replace(seen.before, latency_ms=timed[0])
        after = snapshot(pruned, example, evaluate=seen.judged.evaluate, latency_ms=timed[1], samples=seen.samples)
    run.figures("after", after.quality)
    if limit is not None:
        with run.stage("confirm"):
            limit = confirmed(limit, asked, pruned)
            plan = replace(plan, notes=(*plan.notes, *limit_lines(limit)))
        if limit.verdict == "unconfirmed":
            run.degradations.append(Degradation("confirm", *UNCONFIRMED))
    with run.stage("report"):
        beside = native(pruned, plan)
        run.doubts += [beside.warning] if beside.warning else []
        report = collect(
            base, plan, settings, before=before, after=after, after_cut=after_cut, judged=seen.judged, control=control,
            limit=limit, run=run, title=asked.title, command=asked.command,
        )  # fmt: skip
    return Result(pruned, plan, report, settings, report.degradations, tuple(run.log), beside, kept.folder)


def _look(asked: Asked, kept: RunStages, run: Journal) -> Seen:
    """Measure the model as it came; first of all, since one whose outputs are not finite has nothing to keep."""
    # Decided once, on the model as it came: a ratio of two counts needs one divisor.
    samples = samples_in(asked.model, asked.example)
    judged = _yardstick(asked)
    before = kept.snapshot(
        "before", lambda: snapshot(asked.model, asked.example, evaluate=judged.evaluate, samples=samples)
    )
    # Between two passes, so only on data of their own: loaders of the training would lose their place.
    run.look = judged.evaluate if asked.given.test is not None else None
    run.figures("before", before.quality)
    return Seen(samples, judged, before)


def _decide(asked: Asked, model: nn.Module, run: Journal, kept: RunStages) -> Plan:
    """The plan of the recipe for a model, by scores."""
    example, examples, settings = asked.example, asked.examples, asked.settings
    if set(EXACT) & set(asked.by_hand):  # nothing is scored, so nothing is kept
        return plan_by(model, example, settings, examples=examples, by_hand=asked.by_hand)
    return kept.plan(
        asked.planned or (lambda: plan_by(
            model, example, settings, asked.given.deciding, asked.loss, asked.criterion, examples, asked.by_hand,
            progress=run.step("solve"), finished=kept.blocks,
        )),
        lambda keep: plan_by(model, example, settings, examples=examples, by_hand={"keep": keep}),
    )  # fmt: skip


def _decide_trained(asked: Asked, trained: Trained, run: Journal, kept: RunStages) -> tuple[nn.Module, Plan]:
    """What the plan applies to, and the plan: decided by the training, or by scores of what it has left."""
    training = asked.settings.training
    assert training is not None
    if not training.prunes:
        base = copy_to_go_on_with(asked.model)
        give(base, trained, training.method)
        if not training.decides:
            return base, _decide(asked, base, run, kept)
        units: ByHand = {"keep": trained.keep} if trained.keep else {"scores": trained.scores}
        plan = plan_by(base, asked.example, asked.settings, examples=asked.examples, by_hand=units)
        return base, as_asked(plan, asked.settings, asked.criterion) if trained.keep else plan
    if trained.masks:
        plan = make_plan(asked.model, masks=trained.masks)
    else:
        plan = plan_by(
            asked.model, asked.example, asked.settings, examples=asked.examples, by_hand={"keep": trained.keep}
        )
    return asked.model, as_asked(plan, asked.settings, asked.criterion)


@spoken(Decided.__annotations__)
@shows_progress
def estimate(
    model: nn.Module,
    example: Example = None,
    *,
    data: Given | None = None,
    recipe: Recipe | Mapping[str, object] | str | Path | None = None,
    overrides: Sequence[str] = (),
    calibration: Data | None = None,
    loss: Loss | None = None,
    progress: Progress | bool | None = None,
    title: str = "",
    examples: Sequence[Example] = (),
    **decision: Unpack[Decided],
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
        examples: several examples, as for `prune`.
        **decision: as for `prune`.

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
        >>> told = estimate(model, torch.ones(1, 8), target={"sparsity": 0.5})
        >>> told.report.before.params, told.report.after.params
        (178, 90)
    """
    came, model = model, admit(model, copied=True)
    given = enter(data, calibration=calibration)
    if "protect" in decision:
        decision["protect"] = patterns_of(model, decision["protect"])
    # As if the caller trained: nothing is recovered here, so nothing is missing where there are no data.
    settings, _ = settings_of(recipe, overrides, decision, given, recover=None, own=True)
    units = by_hand(decision, settings)
    require_finite_weights(model)
    example, examples = several(example, examples)
    example = given.example() if example is None else example
    run = Journal(_called(progress), given.notes)
    run.doubts += _doubts(came, model, units)
    with run.stage("plan"), run.noticed():
        samples = samples_in(model, example)
        before = snapshot(model, example, samples=samples)
        plan = plan_by(
            model, example, settings, given.deciding, loss, decision.get("criterion"), examples, by_hand=units
        )
    run.doubts += plan.notes
    with run.stage("apply to a copy"):
        smaller = plan.apply(model)
    with run.stage("measure"):
        timed = time_pair(model, smaller, example, settings.measure, zeros_only=bool(plan.masks))
        before = replace(before, latency_ms=timed[0])
        after = snapshot(smaller, example, latency_ms=timed[1], samples=samples)
    return Estimate(plan, forecast(model, plan, settings, before=before, after=after, run=run, title=title))


def _doubts(came: nn.Module, model: nn.Module, units: ByHand) -> list[str]:
    """What the reader should know before anything is done."""
    found = [] if came is model else [about_wrapper(came)]
    # A loaded model may bring a cut that nobody has proved here: what follows stands on it.
    found += [said for said in (doubt(model),) if said]
    if units:
        names = ", ".join(f"{name}=" for name in units)
        found.append(f"What goes was decided by {names}, which no recipe holds: by it alone other units may go.")
    return found


def _quality(judged: Yardstick, model: nn.Module) -> dict[str, float] | None:
    return None if judged.evaluate is None else dict(judged.evaluate(model))


def _called(progress: Progress | bool | None) -> Progress | None:
    """What `shows_progress` has left of it: a function, or nothing."""
    return progress if callable(progress) else None


def _yardstick(asked: Asked) -> Yardstick:
    if not asked.settings.measure.quality:
        return Yardstick(None, why="not asked for: measure.quality is false")
    found = yardstick(asked.model, asked.given, asked.evaluate, loss=asked.loss)
    # Said before hours are spent on a copy whose only use is to be measured.
    if found.evaluate is None and asked.settings.control == "dense":
        raise RecipeError(
            "control: dense needs a figure of quality, and there is none.",
            why=found.why,
            hint="Pass evaluate=, or batches with targets; or leave the control out.",
        )
    return found
