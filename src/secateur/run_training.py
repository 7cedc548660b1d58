"""What a run trains: before or while it prunes, behind the cut, and the dense control beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from torch import nn

from secateur.asking import Asked
from secateur.files.checkpoint import PAGE
from secateur.measure import Yardstick
from secateur.recipe import Recipe, load_recipe
from secateur.recipe.schema import Step
from secateur.recover.damage import Damage
from secateur.recover.during import Trained, dense_training, train_stage
from secateur.recover.loop import Keeper, TrainStep
from secateur.recover.own import own_training
from secateur.recover.steps import dense_control
from secateur.recover.steps import recover as run_step
from secateur.report.journal import Journal, point
from secateur.report.trackers import Track, tracked
from secateur.report.watch import LivePage
from secateur.stages import RunStages


class ControlFigures(TypedDict):
    """What the dense control was trained with, and how good it is."""

    steps: list[str]
    quality: dict[str, float]


def with_trackers(settings: Recipe, track: Track | Sequence[Track]) -> tuple[Recipe, list[Track]]:
    """Trackers that can be written down go into the recipe, where a run that goes on finds them; objects stay beside.

    Raises:
        RecipeError: an unknown name.
    """
    given = list(track) if isinstance(track, (list, tuple)) else [track]
    written = [one for one in given if isinstance(one, (str, Mapping))]
    if written:
        plain = settings.model_dump(mode="json", by_alias=True, exclude_none=True)
        settings = load_recipe({**plain, "track": written})
    return settings, [one for one in given if not isinstance(one, (str, Mapping))]


def watch(run: Journal, settings: Recipe, objects: Sequence[Track], folder: Path | None, title: str) -> None:
    """Let trackers and the page of live curves see the run; they start before it does.

    Raises:
        RecipeError, UnsupportedError: a tracker is none, misses its package or does not start.
    """
    if folder is not None and (settings.training is not None or settings.recover):
        run.watchers.append(LivePage(folder / PAGE, title))
    plain = settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    run.watchers += tracked([*plain.get("track", ()), *objects], plain, title)


def train_first(asked: Asked, run: Journal, keeper: Keeper | None) -> Trained:
    """The recipe's training before or while the model is pruned."""
    training, given = asked.settings.training, asked.given
    assert training is not None
    assert given.train is not None
    return train_stage(
        asked.model, asked.example, asked.settings, train=given.train, scoring=given.scoring, loss=asked.loss,
        criterion=asked.criterion, progress=run.curve(f"train: {training.method}"), keeper=keeper,
    )  # fmt: skip


def recorded(run: Journal, trained: Trained) -> None:
    """Put the losses of that training into the report."""
    _log(run, trained.records)


def recover_all(asked: Asked, damage: Damage, pruned: nn.Module, run: Journal, kept: RunStages) -> None:
    """The recovery steps of the recipe, and a loop of the user's after them; each a stage."""
    seed, train = asked.settings.seed, asked.train
    for number, step in enumerate(asked.settings.recover):
        name = f"recover {number + 1}: {step.method}"
        with run.stage(name), run.noticed():
            kept.training(name, pruned, partial(_recover, pruned, step, damage, asked, run))
    if train is not None:
        with run.stage("train"):
            # Without a keeper: how far a loop of the user's has come is its own to know, so it is done as a whole.
            kept.training("train", pruned, lambda _: own_training(pruned, train, damage.masks, seed=seed))


def _recover(model: nn.Module, step: Step, damage: Damage, asked: Asked, run: Journal, keeper: Keeper | None) -> None:
    """One recovery step of the recipe, and its losses for the report."""
    given = asked.given
    assert given.train is not None
    assert given.scoring is not None
    records = run_step(
        model,
        step,
        damage,
        train=given.train,
        scoring=given.scoring,
        loss=asked.loss,
        seed=asked.settings.seed,
        progress=run.curve(step.method),
        keeper=keeper,
    )
    _log(run, records)


def _log(run: Journal, records: Sequence[TrainStep]) -> None:
    """Add the steps of a training to the curve, behind those that were made before."""
    first = len(run.training)
    run.training += [point(first, record) for record in records]


def trained_control(asked: Asked, judged: Yardstick, run: Journal, kept: RunStages) -> ControlFigures:
    """The original after the same training and steps, and its quality on the same samples."""
    recipe, data = asked.settings, asked.given.train
    assert data is not None
    assert judged.evaluate is not None
    shown = run.step("control: dense")

    def training(model: nn.Module) -> str:
        keeper = kept.keeper("control training")
        dense_training(model, asked.model, recipe, train=data, loss=asked.loss, progress=shown, keeper=keeper)
        return recipe.training.method if recipe.training is not None else ""

    trained, steps = dense_control(
        asked.model,
        recipe.recover,
        train=data,
        loss=asked.loss,
        seed=recipe.seed,
        training=None if recipe.training is None else training,
        progress=shown,
        keep=lambda number: kept.keeper(f"control {number}"),
    )
    if asked.train is not None:
        own_training(trained, asked.train, {}, seed=recipe.seed)
        steps = (*steps, "train")
    return {"steps": list(steps), "quality": dict(judged.evaluate(trained))}
