"""Prune a language model that is larger than the memory: folder in, folder out, one block at a time.

The weights are copied to the new folder first, and are changed there in place. Only the block at hand is in memory,
with what it makes of the batches; hidden states beyond the budget lie on disk, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import nn

from secateur.errors import RecipeError, ResourceError
from secateur.files import canonical_json
from secateur.files.atomic import publish_dir
from secateur.integrations.transformers import TOKENIZER
from secateur.kinds.find import spelt_out
from secateur.kinds.weights.granularity import parse
from secateur.measure.counts import num_params, size_bytes
from secateur.measure.macs import count, samples_in
from secateur.measure.perplexity import perplexity
from secateur.planning.build import units_of
from secateur.planning.decision import fingerprint
from secateur.planning.solved import notes_of, settings_of, solver_of
from secateur.planning.unread import refuse_others
from secateur.recipe import Recipe, dump_recipe
from secateur.recipe.schema import Measure
from secateur.report import (
    Choice,
    Effect,
    Goal,
    Layer,
    Method,
    Origin,
    Report,
    UnitCount,
    build,
    environment,
    render_html,
)
from secateur.report.card import render_card
from secateur.report.journal import Journal
from secateur.request import Named, Request, Target
from secateur.solve.base import Solver
from secateur.solve.blocks.forecast import Forecast, forecast
from secateur.solve.blocks.layer import LayerRecord
from secateur.solve.blocks.run import Settings, SolvedModel, prune_blocks
from secateur.sources.in_memory import DataSet
from secateur.sources.on_disk import ENDING, ModelOnDisk, require_weights
from secateur.types import Degradation, Progress, Snapshot

CONFIGS = ("config.json", "generation_config.json")
# Keys of a recipe that are read, with those that have an answer of their own.
READS = ("criterion", "granularity", "scope", "target", "protect", "seed", "training", "recover", "blocks",
         "calibration", "measure")  # fmt: skip
INDEX = f"model{ENDING}.index.json"


@dataclass(frozen=True, eq=False)
class FolderTask:
    """What is asked of a folder.

    Args:
        solver, settings, request: what a recipe says.
        data: text, as blocks of tokens.
    """

    solver: Solver
    settings: Settings
    request: Request
    data: DataSet

    @classmethod
    def of(cls, recipe: Recipe, data: DataSet) -> FolderTask:
        """Read it from a recipe.

        Raises:
            RecipeError: the recipe asks for more than a solver does, or for what needs the whole model in memory.
        """
        plain = recipe.model_dump(by_alias=True)
        solver = solver_of(plain["criterion"], plain["blocks"])
        if solver is None:
            raise RecipeError(
                f"blocks.from_disk is for solvers, and criterion {recipe.criterion!r} is none.",
                why="a solver decides block by block; scores rank the whole model at once",
                hint="--recipe language-model, or --criterion admm",
            )
        if recipe.recover or recipe.training is not None:
            raise RecipeError("A model on disk cannot be trained.", hint="--recover none")
        refuse_others(recipe, READS, "A run whose model stays on disk")
        if recipe.measure not in (Measure(), Measure(latency=False)):
            raise RecipeError(
                "A run whose model stays on disk reads nothing of measure.",
                why="quality is measured block by block, and nothing is timed",
                hint="Leave it out; calibration.test says how much text quality is measured on.",
            )
        settings = settings_of(plain["blocks"])
        if settings.allocation is not None:
            raise RecipeError("blocks.allocation compares whole models in memory.", hint="leave it out")
        unit = units_of(plain["granularity"], data.example)[1]
        request = Request(
            target=Target.of(recipe.target.given()),
            criterion=Named(solver.name, solver.options()),
            granularity=spelt_out(unit),
            scope=recipe.scope,
            protect=tuple(recipe.protect),
            seed=recipe.seed,
        )
        return cls(solver, settings, request, data)

    @property
    def tokens(self) -> int:
        """All tokens of the calibration."""
        return sum(batch["input_ids"].numel() for batch in self.data.calibration if isinstance(batch, dict))


def foresee(disk: ModelOnDisk, task: FolderTask) -> Forecast:
    """Time and memory of a run, before it starts.

    Raises:
        ResourceError: more memory is needed than may be used.
    """
    told = forecast(
        disk.model, task.data.example, task.solver, tokens=task.tokens, settings=task.settings,
        target=task.request.target, protect=task.request.protect,
    )  # fmt: skip
    disk.release()
    budget = task.settings.memory_bytes
    if budget is not None and told.least_bytes > budget:
        raise ResourceError(
            f"blocks.memory_bytes is {budget:,}, and {told.least_bytes:,} are needed",
            why="the largest block, what it makes of all batches, and second moments have to be in memory together",
            hint="fewer or shorter sequences (calibration.sequences, calibration.tokens), or more memory",
        )
    return told


def prune_folder(
    folder: Path,
    out: Path,
    data: DataSet,
    recipe: Recipe,
    *,
    word: str = "",
    command: str = "",
    force: bool = False,
    progress: Progress | None = None,
    begun: Path | None = None,
    tell: Callable[[Forecast], None] | None = None,
) -> Report:
    """Prune the model of a folder, block by block, without ever holding it.

    Args:
        folder: a model that `save_pretrained` has written, in one safetensors file or several; left as it is.
        out: the folder to publish, whole or not at all; it needs the disk space of the model.
        data: blocks of tokens.
        recipe: a solver's, with ``blocks.from_disk``.
        word: how messages and the report call the model.
        command: the command line that reproduces the run.
        force: replace an earlier output.
        progress: called as ``progress(stage, done, total)``.
        begun: folder of finished blocks: the same call goes on behind the last of them.
        tell: called with the estimate before anything long starts.

    Returns:
        the report, which lies in the folder, too.

    Raises:
        ResourceError: the budget is too small; said before anything is changed.
        RecipeError, InputError, UnsupportedError, FileRefusedError: as for `secateur.prune`.

    Cost:
        as `secateur.prune` with the same recipe, and the reading of all weights once per pass. Memory: 2.2 times the
        largest block, its activations for all batches, second moments; beside the widest weight outside of the blocks.
    """
    require_weights(folder)
    task = FolderTask.of(recipe, data)
    run = Journal(progress, data.notes)
    with publish_dir(out, force=force) as staged:
        for name in _files(folder):
            shutil.copyfile(folder / name, staged / name)
        disk = ModelOnDisk(staged, word or str(folder))
        try:
            told = foresee(disk, task)
            if tell is not None:
                tell(told)
            report = _pruned(disk, task, recipe, run, told, begun, (word or str(folder), command))
        finally:
            disk.close()
        _describe(staged, report, recipe, type(disk.model).__name__)
    return report


def _files(folder: Path) -> list[str]:
    """Weights, configs and the tokenizer: nothing else of a folder is known to be harmless, or to fit."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return sorted(n for n in names if n.endswith(ENDING) or n in (*CONFIGS, INDEX) or TOKENIZER.fullmatch(n))


def _pruned(
    disk: ModelOnDisk,
    task: FolderTask,
    recipe: Recipe,
    run: Journal,
    told: Forecast,
    begun: Path | None,
    names: tuple[str, str],
) -> Report:
    """Look, solve in place, look again."""
    model, example = disk.model, task.data.example
    with run.stage("look"):
        seen = fingerprint(model)
        before = _snapshot(disk, task.data)
    settings = task.settings
    budget = settings.memory_bytes
    room = None if budget is None else max(budget - told.least_bytes, 0)
    settings = replace(settings, memory_bytes=room, checkpoint=settings.checkpoint or begun)
    with run.stage("plan"):
        solved = prune_blocks(
            model, example, task.data.calibration, solver=task.solver, request=task.request, settings=settings,
            granularity=parse(task.request.granularity[0].spec()), progress=run.step("solve"), in_place=True,
            release=disk.release,
        )  # fmt: skip
    run.doubts += notes_of(solved, settings, task.request, task.solver)
    with run.stage("measure"):
        after = _snapshot(disk, task.data)
    return _report(model, task, recipe, run, solved, (before, after), (*names, seen))


def _snapshot(disk: ModelOnDisk, data: DataSet) -> Snapshot:
    model, example = disk.model, data.example
    macs = count(model, example).total // samples_in(model, example)
    quality = {} if data.test is None else perplexity(model, data.test)
    nonzero = 0
    for parameter in model.parameters():
        nonzero += int(torch.count_nonzero(parameter.detach()))
        disk.release()
    return Snapshot(params=num_params(model), nonzero=nonzero, macs=macs, size_bytes=size_bytes(model), quality=quality)


def _report(
    model: nn.Module,
    task: FolderTask,
    recipe: Recipe,
    run: Journal,
    solved: SolvedModel,
    seen: tuple[Snapshot, Snapshot],
    names: tuple[str, str, str],
) -> Report:
    """What a run in memory says, but for the certificate and histograms, which need both models."""
    title, command, before = names
    removed, total = (sum(getattr(one, what) for one in solved.records) for what in ("removed", "total"))
    criterion, unit = task.request.criterion, task.request.granularity[0]
    missing = [one for one in solved.left_out if one.wanted]
    lacks = [Degradation("plan", f"{one.name} was left out", one.why) for one in missing]
    events = replace(run.events(), degradations=(*run.degradations, *lacks))
    asked = recipe.target.given()
    return build(
        Origin(title, before, environment(seed=recipe.seed), command, recipe.model_dump(mode="json", by_alias=True)),
        Method(
            Choice(name=criterion.name, options=_json(criterion.options)),
            Choice(name=unit.name, options=_json(unit.options)),
            recipe.scope,
            Choice(name=task.request.allocation),
        ),
        Effect(
            *seen,
            applied="mask",
            units=UnitCount(removed=removed, total=total, what=f"{task.request.what} units"),
            certificate=None,
            certificate_reason="zeros are written; no slice is cut",
            quality_on="the test part" if seen[1].quality else "",
            quality_missing="" if seen[1].quality else "there is no test part",
            left_out=solved.left_out,
        ),
        goal=Goal(Target.of(asked).flat(), {"sparsity": removed / max(total, 1)}),
        events=events,
        layers=_layers(model, solved.records),
    )


def _layers(model: nn.Module, records: Sequence[LayerRecord]) -> list[Layer]:
    """One row per parameter; the matrices of a stack of experts add up."""
    gone: dict[str, int] = {}
    for one in records:
        name = one.name.partition("[")[0]
        gone[name] = gone.get(name, 0) + one.removed
    found = []
    for name, removed in gone.items():
        weight = model.get_parameter(name)
        size = weight.numel()
        # Of the weights as they are now: those that came are in the folder that was read.
        found.append(
            Layer(name=name, shape=tuple(weight.shape), params_before=size, params_after=size, removed=removed,
                  total=size, sparsity=removed / size, near_zero=removed / size)
        )  # fmt: skip
    return found


def _json(options: Mapping[str, object]) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = json.loads(canonical_json(dict(options)))
    return found


def _describe(folder: Path, report: Report, recipe: Recipe, kind: str) -> None:
    """Report, recipe and model card beside the weights."""
    texts = {
        "report.json": report.to_json(),
        "report.html": render_html(report),
        "recipe.yaml": dump_recipe(recipe),
        "README.md": render_card(report, kind=kind, native=True),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
