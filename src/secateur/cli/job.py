"""What a command line asks for, as objects: model, data, recipe, example, evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.cli.console import say
from secateur.errors import FileRefusedError, ForwardError, InputError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from secateur.cli.decisions import Decisions
    from secateur.measure import Yardstick
    from secateur.recipe import Recipe, Setting
    from secateur.sources import DataSet, Source
    from secateur.stages import CommandWords, Unfinished
    from secateur.types import Example, Judge

DEFAULT_RECIPE = "channel-half-macs"


@dataclass(frozen=True, eq=False)
class Job:
    """A resolved command line.

    Args:
        source: the model and where it came from.
        data: its loaders, or None.
        example: forward inputs, or None where neither model nor data give any.
        metric: how quality is measured; None = by the labels.
    """

    source: Source
    data: DataSet | None
    example: Example
    metric: Judge | None = None

    @property
    def model(self) -> nn.Module:
        """The module."""
        return self.source.model

    @cached_property
    def judged(self) -> Yardstick:
        """How quality is measured, found out by one batch when it is first asked for: most commands never do."""
        from secateur.measure import yardstick
        from secateur.model.door import enter

        return yardstick(self.model, enter(self.data), self.metric)

    def needed_example(self) -> Example:
        """The example; an error says how to give one."""
        if self.example is None:
            raise InputError(
                f"{self.source.name} brings no example input.",
                hint="Give --data, or let the py: factory return (model, example).",
            )
        return self.example


def read_recipe(
    recipe: str | None,
    overrides: Sequence[str | Setting] | None,
    seed: int | None,
    decided: Decisions | None = None,
) -> Recipe:
    """The recipe with what the command line decides; names are looked up at once, before anything long starts."""
    from secateur.kinds.weights import parse
    from secateur.kinds.weights.kind import COUNTED, not_of_masks
    from secateur.planning.build import criterion_of, implied_target, is_structured
    from secateur.planning.solved import solver_of
    from secateur.planning.unread import refuse_unread
    from secateur.recipe import load_recipe
    from secateur.recipe.overrides import Setting
    from secateur.request import granularities

    asked = [] if decided is None else decided.settings()
    asked += [] if seed is None else [Setting(("seed",), seed, f"--seed {seed}")]
    changes: list[str | Setting] = [*asked, *(overrides or ())]
    found = load_recipe(recipe or _default(changes), changes)
    implied = implied_target(found.model_dump(by_alias=True)["granularity"])
    chosen = recipe is not None or any(_about_target(change) for change in changes)
    if implied is not None and not chosen:
        # Nobody asked for the default recipe's target, and the pattern says what goes.
        found = load_recipe(found, [Setting(("target",), implied.given(), "the pattern's own target")])
    plain = found.model_dump(by_alias=True)
    solver = solver_of(plain["criterion"], plain["blocks"])
    if solver is None:
        criterion_of(plain["criterion"])
    # What stays on disk has an answer of its own, which says where a solver is to be had.
    refuse_unread(
        granularities(plain["granularity"]), {**found.choices(), "expressible": found.expressible}, solver=solver,
        blocks={**plain["blocks"], "from_disk": False},
    )  # fmt: skip
    if not is_structured(plain["granularity"]):
        unit = parse(plain["granularity"])
        for what in found.target.given() if chosen else ():
            if what not in COUNTED:
                raise not_of_masks(what, unit.name)
    return found


def _about_target(change: str | Setting) -> bool:
    first = change.partition("=")[0].split(".")[0].strip() if isinstance(change, str) else change.keys[0]
    return first == "target"


def _default(changes: Sequence[str | Setting]) -> str:
    """The recipe that stands in where none is named: a solver that `--set criterion=...` names has one of its own."""
    from secateur.asking import default_recipe
    from secateur.recipe import load_recipe

    return default_recipe(load_recipe(DEFAULT_RECIPE, changes).model_dump(by_alias=True)["criterion"])


def use_threads(threads: int | None) -> None:
    """Set torch's number of threads, if one is asked for."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def resolve(
    model: str,
    data: str | None,
    *,
    seed: int = 0,
    text: Mapping[str, int | None] | None = None,
    device: str | None = None,
    metric: Sequence[str] | None = None,
) -> Job:
    """Turn MODEL, DATA and METRIC words into objects, and check that they fit; `text` is a recipe's calibration."""
    from secateur.sources import on_device, resolve_metric, resolve_model
    from secateur.sources.data import NOT_READ
    from secateur.sources.metrics import needs_labels

    if data is None and needs_labels(metric or ()):
        raise RecipeError(f"--metric {(metric or [''])[0]} needs data with labels.", hint="Give --data.")
    judge = resolve_metric(metric or ())

    source = on_device(resolve_model(model, seed=seed), device)
    found = None
    if data is not None:
        found = source.read(data, seed=seed, text=text)
    example = source.example
    if found is not None and found.example is not None:
        if source.example is not None:
            _check_fit(source, found)
        # The data's own, as it is what the model will be trained and measured on.
        example = found.example
    example = _beside(source.model, example)
    if found is not None and source.name.startswith("demo:") and not source.trained:
        # Demo networks are trained here, on the training part: no note that they may have seen the rest.
        found = replace(found, notes=tuple(note for note in found.notes if NOT_READ in note))
    return Job(source, found, example, judge)


def pruned(folder: str | Path, job: Job) -> nn.Module:
    """The network of an output folder of prune, demo or deploy, made of the job's model; says what is not proved."""
    import secateur as sc
    from secateur.deployment.folders import LAYERS
    from secateur.loading import doubt

    if (Path(folder) / LAYERS).is_file():
        return sc.load_deployed(folder, model=job.model)
    network = sc.load(folder, model=job.model, example=job.example)
    said = doubt(network)
    if said:
        say(f"note: {said}; --data, or a factory that returns (model, example), lets it be proved", style="yellow")
    return network


def _beside(model: nn.Module, example: Example) -> Example:
    """The example on the device of the model: data lie in the memory of the CPU."""
    from secateur.model.call import device_of, to_device

    return to_device(example, device_of(model)) if device_of(model).type not in ("cpu", "meta") else example


def warn_untrained(job: Job) -> None:
    """A network with random weights is pruned like any other, and says nothing about quality."""
    if not job.source.trained:
        say(f"note: {job.source.name} has random weights; `secateur demo` trains it first", style="yellow")


def _check_fit(source: Source, data: DataSet) -> None:
    """Where the model runs on its own example and fails on the data's, the data are what does not fit."""
    from secateur.model.call import call, describe
    from secateur.model.guard import evaluating

    with evaluating(source.model, example=(source.example, data.example)):
        # A model that fails on its own example is at fault itself: that error is passed on as it is.
        call(source.model, _beside(source.model, source.example))
        try:
            call(source.model, _beside(source.model, data.example))
        except ForwardError as error:
            hint = "Bring the data to the shape that the forward takes."
            if isinstance(source.example, Mapping) and "decoder_input_ids" in source.example:
                hint = "A decoder beside an encoder needs tokens of its own: give batches of input_ids, "
                hint += "decoder_input_ids and labels by a factory (FILE.py:function)."
            raise InputError(
                f"{data.name} does not fit {source.name}: a sample is {describe(data.example)}, "
                f"the model's own example {describe(source.example)}.",
                why=error.why,
                hint=hint,
            ) from error


def require_free(path: Path, *, force: bool) -> None:
    """Refuse an output folder that is in the way, before the long work and not after it.

    Raises:
        FileRefusedError: it exists, or its parent may not be written.
    """
    from secateur.files.atomic import absolute, require_free

    target = absolute(path)
    require_free(target, force=force)
    _require_writable(target)


def unfinished(out: Path, words: CommandWords, *, force: bool) -> Unfinished:
    """Where a run for an output folder keeps what it has done; with `force` an earlier one is forgotten."""
    from secateur.files.checkpoint import INDEX, Checkpoint
    from secateur.stages import Unfinished

    place = Unfinished.beside(out, words)
    if force and (place.folder / INDEX).exists():
        Checkpoint(place.folder).remove()
    elif (place.folder / INDEX).exists():
        say(f"note: going on with the run in {place.folder}; --force starts anew")
    return place


def require_free_file(path: Path, *, force: bool) -> None:
    """The same for a single file."""
    # lexists: a link that leads nowhere is in the way too.
    if os.path.lexists(path) and (path.is_dir() or not force):
        hint = "choose another name" if path.is_dir() else "choose another name, or use --force to replace it"
        raise FileRefusedError(f"{path} exists already", why="an output is never overwritten unless asked", hint=hint)
    _require_writable(path.absolute())


def _require_writable(target: Path) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise FileRefusedError(f"{target} cannot be written", why=f"{parent} is no folder that may be written")
