"""Runs that were interrupted, killed or crashed, and how they go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import FileRefusedError, RecipeError
from secateur.files.checkpoint import EVERY, INDEX, Checkpoint
from secateur.files.seeds import seed_everything
from secateur.model.call import device_of, to_device
from secateur.model.door import Given
from secateur.pipeline import prune
from secateur.planning.build import CriterionLike
from secateur.recover.own import Train
from secateur.report.trackers import Track
from secateur.result import Result
from secateur.sources import on_device, resolve_metric, resolve_model
from secateur.stages import SUFFIX, CommandWords, Unfinished
from secateur.types import Data, Example, Judge, Loss, Progress


@dataclass(frozen=True)
class InterruptedRun:
    """What is known of an interrupted run.

    Args:
        folder: of its states.
        recipe: as it was resolved.
        words: MODEL, DATA, output folder and further words of the command line; empty for a run of Python's.
        own: whether it trains by a loop of the user's.
        done: names of the states that are there.
        given: whether the caller gave units or scores, which are not kept.
        limit: of a run that finds its amount: max_drop, smallest and confidence.
    """

    folder: Path
    recipe: Mapping[str, Any]
    words: CommandWords
    own: bool
    done: tuple[str, ...]
    given: bool = False
    limit: Mapping[str, object] | None = None


def find(folder: str | Path) -> InterruptedRun:
    """What an interrupted run was about; nothing is changed.

    Args:
        folder: the output folder that it was to write, or the folder of its states.

    Raises:
        FileRefusedError: there is none, or it is damaged or in use.
    """
    path = Path(folder)
    beside = path.with_name(path.name + SUFFIX)
    # Opened as the run itself would: one that still goes on has the folder, and is refused here.
    checkpoint = Checkpoint(beside if not (path / INDEX).exists() and beside.is_dir() else path)
    try:
        about = checkpoint.about
        if about.get("what") != "prune":
            raise FileRefusedError(f"{checkpoint.folder} holds no run of prune", hint="see the command that made it")
        return InterruptedRun(
            checkpoint.folder, about["recipe"], about["words"], about["train"], checkpoint.names, "given" in about,
            about.get("limit"),
        )  # fmt: skip
    finally:
        checkpoint.close()


def resume(
    folder: str | Path,
    model: nn.Module | None = None,
    example: Example = None,
    *,
    data: Given | None = None,
    calibration: Data | None = None,
    test: Data | None = None,
    loss: Loss | None = None,
    evaluate: Judge | None = None,
    train: Train | None = None,
    criterion: CriterionLike | None = None,
    every: float = EVERY,
    progress: Progress | None = None,
    title: str = "",
    command: str = "",
    track: Track | Sequence[Track] = (),
) -> Result:
    """Go on with a run of `prune` that was interrupted, killed or crashed; the result is that of a run without it.

    Stages that are done are not done again, and a training goes on from its last state: weights, optimizer, schedule,
    random generators, place in the data. The plan is applied and proved anew, since a file is no proof.

    Args:
        folder: the output folder of ``secateur prune``, or the folder that was given as `checkpoint`.
        model: the model as it was before pruning. Left out for a run of the command line, which wrote down how it found
            model and data.
        example: as for `prune`.
        data: as for `prune`.
        calibration: as for `prune`.
        test: as for `prune`.
        loss: as for `prune`.
        evaluate: as for `prune`.
        train: as for `prune`; needed where the run had one.
        criterion: where the run was given an object that is not registered.
        every: seconds between two states of a training.
        progress: called as ``progress(stage, done, total)``; total 0 = not known.
        title: what the report calls the run.
        command: the command line that reproduces it.
        track: trackers that were given as objects; those with names are known.

    Returns:
        as `prune`; ``result.save`` removes the states.

    Raises:
        FileRefusedError: nothing to resume, a damaged file, or another model than that of the run.
        RecipeError: model or loop are missing.
        InputError: the data give other batches than before.
    """
    known = find(folder)
    if known.own and train is None:
        raise RecipeError("this run trains by a loop of its own", hint="pass train=, the same as before")
    if known.given:
        raise RecipeError(
            "this run was given its units or scores, which its folder does not hold",
            hint="call prune again with the same arguments and this folder as checkpoint=",
        )
    place = Unfinished(known.folder, every, known.words)
    rest: dict[str, Any] = {} if criterion is None else {"criterion": criterion}
    rest |= {"loss": loss, "evaluate": evaluate, "train": train, "recipe": known.recipe, "checkpoint": place}
    rest |= {"progress": progress, "title": title, "command": command, "track": track}
    rest |= {} if known.limit is None else dict(known.limit)
    if model is not None:
        return prune(model, example, data=data, calibration=calibration, test=test, **rest)
    if not known.words:
        raise RecipeError(
            "this run was started in Python, so its folder does not say how to build the model",
            hint="pass model=, data= and whatever else was given to prune",
        )
    # Seeded as the command was: networks and splits that are made here must be those of the run.
    seed = int(known.recipe["seed"])
    with seed_everything(seed):
        source = on_device(resolve_model(known.words["model"], seed=seed), known.words.get("device"))
        word = known.words["data"]
        # Blocks of text as long and as many as they were: others would be another run's.
        text = known.recipe.get("calibration") or {}
        found = None
        if word is not None:
            found = source.read(word, seed=seed, text=text)
        if evaluate is None:
            rest["evaluate"] = resolve_metric(known.words.get("metric", ()))
        own = source.example if found is None or found.example is None else found.example
        if known.words.get("device") is not None:
            own = to_device(own, device_of(source.model))
        return prune(source.model, own, data=found, **rest)
