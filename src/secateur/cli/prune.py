"""``secateur prune``: a network goes in, a smaller one comes out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from secateur.cli import options
from secateur.cli.console import emit, out, say, write
from secateur.cli.decisions import OPTIONS, Decisions, decides
from secateur.cli.typed import only
from secateur.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from secateur.cli.job import Job
    from secateur.objective.limits import AtMostWords
    from secateur.recipe import Recipe
    from secateur.result import Result
    from secateur.solve.blocks.forecast import Forecast
    from secateur.stages import CommandWords, Unfinished


EXAMPLES = (
    "prune mynet.py:build --data npz:mine.npz --macs 0.5 --out runs/mine",
    "prune demo:lenet --sparsity 0.3 --recover none --out runs/small",
    "prune mynet.py:build --data npz:mine.npz --metric f1 --out runs/f1",
    "prune net.py:build --data npz:mine.npz --max-drop 1.0 --out runs/mine",
    "prune hf:FOLDER --params 0.8 --expressible --data tsv:sst2 --out hf",
)

# Options that a run reads whose model stays on disk; of the devices it knows the CPU alone.
ON_DISK = (*(name for name in OPTIONS if name != "device"), "model", "out", "data", "recipe", "set_", "seed", "threads",
           "force")  # fmt: skip
ALONE = "the model is never in memory as a whole: its blocks are read, solved and written one by one, on the CPU"


@decides()
def prune(
    model: options.Model,
    out: options.Out,
    decided: Decisions,
    data: options.Data = None,
    metric: options.Metric = None,
    recipe: options.RecipeName = None,
    set_: options.Sets = None,
    seed: options.Seed = None,
    track: options.Track = None,
    max_drop: options.MaxDrop = None,
    smallest: options.Smallest = None,
    confidence: options.Confidence = None,
    threads: options.Threads = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Prune MODEL by a recipe, prove the result, recover, measure, and write an output folder."""
    from secateur.cli import job as jobs
    from secateur.cli.crew import Crew
    from secateur.cli.sample import with_sample
    from secateur.files import seed_everything
    from secateur.model.tensors import require_storable
    from secateur.objective.limits import require_data

    settings = jobs.read_recipe(recipe, set_, seed, decided)
    limit = limit_of(max_drop, smallest, confidence, decided, set_ or (), dry_run=dry_run)
    require_data(max_drop, data)
    crew = Crew.of(settings, limit)
    if track:
        from secateur.run_training import with_trackers

        settings, _ = with_trackers(settings, track)
    # Before anything is loaded: hours of work must not end at a folder that is taken.
    jobs.require_free(out, force=force)
    words: CommandWords = {"model": model, "data": data, "out": str(out), "threads": threads, "force": force}
    words["metric"], words["device"] = list(metric or ()), decided.device
    place = None if dry_run or crew.several else jobs.unfinished(out, words, force=force)
    jobs.use_threads(threads)
    if settings.blocks.from_disk:
        only("blocks.from_disk", (*ON_DISK, *(["device"] if decided.device == "cpu" else [])), why=ALONE)
        return prune_on_disk(model, data, settings, out, force=force, as_json=json)
    with crew.joined(), seed_everything(settings.seed):
        text = settings.calibration.model_dump()
        device = crew.device(decided.device)
        work = crew.sharing(jobs.resolve(model, data, seed=settings.seed, text=text, device=device, metric=metric))
        if crew.helps:
            return crew.help(work, settings)
        jobs.warn_untrained(work)
        # Nor at a model that cannot be written down.
        require_storable(work.model)
        say_forecast(work, settings)
        if dry_run:
            return show_plan(work, settings, as_json=json)
        command = command_line(model, data, settings, out, decided.device, metric)
        result = with_sample(work, run(work, settings, title=model, command=command, place=place, limit=limit))
        save(result, out, force=force)
    return finish(result, out, as_json=json)


def prune_on_disk(model: str, data: str | None, settings: Recipe, folder: Path, *, force: bool, as_json: bool) -> int:
    """Prune a folder of transformers whose weights are never in memory together."""
    import shutil
    from pathlib import Path

    from secateur.cli.progress import Stages
    from secateur.errors import InputError
    from secateur.files import seed_everything
    from secateur.from_disk import prune_folder
    from secateur.report import render
    from secateur.sources import resolve_data
    from secateur.sources.models import text_of

    kind, _, name = model.partition(":")
    if kind != "hf" or data is None:
        raise InputError(
            f"blocks.from_disk prunes a folder of transformers on text, not {model} on {data or 'no data'}.",
            why="weights stay in the folder's safetensors files, and its tokenizer reads the text",
            hint="Write hf:FOLDER --data text:FILE, or leave blocks.from_disk out: then the model is in memory.",
        )
    source, begun = Path(name).expanduser(), folder.with_name(f"{folder.name}.blocks")
    if force:
        shutil.rmtree(begun, ignore_errors=True)
    elif begun.exists():
        say(f"note: going on with the blocks in {begun}; --force starts anew")
    with seed_everything(settings.seed), Stages() as stages:
        tokenizer, longest = text_of(source)
        how = settings.calibration.model_dump()
        text = resolve_data(data, seed=settings.seed, tokenizer=tokenizer, text=how, longest=longest)
        report = prune_folder(
            source, folder, text, settings, word=model, force=force, progress=stages, begun=begun,
            command=command_line(model, data, settings, folder), tell=lambda told: say_told(told, "in memory"),
        )  # fmt: skip
    shutil.rmtree(begun, ignore_errors=True)
    if as_json:
        emit({**json.loads(report.to_json()), "out": str(folder)})
    else:
        render(report, console=out(), files={k: v for k, v in files_of(folder).items() if k != "plan"})
    return report.exit_code


def say_forecast(work: Job, settings: Recipe) -> None:
    """Say what a run of a solver will take, before it starts."""
    from secateur.planning.solved import settings_of, solver_of
    from secateur.request import Target
    from secateur.solve.blocks.forecast import forecast

    plain = settings.model_dump(by_alias=True)
    solver = solver_of(plain["criterion"], plain["blocks"])
    if solver is None or work.data is None or work.data.calibration is None:
        return
    batches = [batch for batch in work.data.calibration if isinstance(batch, dict)]
    tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    if tokens:
        how = settings_of(plain["blocks"])
        told = forecast(
            work.model,
            work.needed_example(),
            solver,
            tokens=tokens,
            settings=how,
            target=Target.of(settings.target.given()),
            protect=settings.protect,
        )
        say_told(told, "beside the model")


def say_told(told: Forecast, where: str) -> None:
    """One line of what a run will take."""
    from secateur.report.safe_text import size

    bytes_ = told.memory_bytes if where == "beside the model" else told.least_bytes
    say(
        f"{told.weights:,} weights, {told.tokens:,} tokens: about {told.seconds / 60:.1f} minutes here, "
        f"{size(bytes_)} {where}"
    )


def save(result: Result, folder: Path, *, force: bool) -> None:
    """Write the output folder; that it loads with secateur alone is said in the report, and not twice."""
    import warnings

    from secateur.result import NotNativeWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotNativeWarning)
        result.save(folder, force=force)


def run(
    work: Job,
    settings: Recipe,
    *,
    title: str,
    command: str,
    place: Unfinished | None = None,
    limit: AtMostWords | None = None,
) -> Result:
    """Prune with progress on standard error; what is done is kept in `place`."""
    import secateur as sc
    from secateur.cli.progress import Stages
    from secateur.objective.limits import NO_LIMIT

    if place is not None and (settings.training is not None or settings.recover):
        from secateur.files.checkpoint import PAGE

        say(f"curves while it trains: {place.folder / PAGE}")
    with Stages() as stages:
        return sc.prune(
            work.model,
            work.needed_example(),
            data=work.data,
            recipe=settings,
            evaluate=work.metric,
            checkpoint=place,
            progress=stages,
            title=title,
            command=command,
            **(limit or NO_LIMIT),
        )


def limit_of(
    max_drop: float | None,
    smallest: str | None,
    confidence: float | None,
    decided: Decisions,
    changes: Sequence[str] = (),
    *,
    amount: str | None = None,
    dry_run: bool = False,
) -> AtMostWords | None:
    """What --max-drop and its words ask for, checked before anything is loaded; `amount` is the demo's own target.

    Raises:
        RecipeError: a target beside it, a word of it alone, a number out of range, or a dry run.
    """
    from secateur.cli.decisions import TARGETS
    from secateur.objective.limits import limit_words_of

    asked = [f"--{name}" for name in TARGETS if getattr(decided, name) is not None]
    # A target that only the recipe holds is what the limit takes the place of; one that was typed was meant.
    asked += [f"--set {one}" for one in changes if one.partition("=")[0].split(".")[0].strip() == "target"]
    if max_drop is not None and (asked or amount is not None):
        raise RecipeError(
            f"--max-drop and {asked[0] if asked else '--sparsity'} both say how much goes.",
            hint="Leave one of them out; --smallest of prune says what is to be small.",
        )
    if max_drop is not None and dry_run:
        raise RecipeError(
            "--dry-run finds no amount for --max-drop.",
            why="amounts are tried, and every one is recovered and measured",
        )
    return limit_words_of(max_drop, smallest, confidence)


def show_plan(work: Job, settings: Recipe, *, as_json: bool) -> int:
    """Print what would be removed; nothing is changed or written."""
    from secateur.asking import plan_by
    from secateur.recipe import dump_recipe

    plan = plan_by(work.model, work.needed_example(), settings, None if work.data is None else work.data.calibration)
    plan.certify()
    if as_json:
        emit({"dry_run": True, "plan": json.loads(plan.to_json()), "recipe": settings.model_dump(mode="json")})
        return 0
    write(f"{plan.explain()}\n\nrecipe:\n{dump_recipe(settings)}\ndry run: nothing was changed or written\n")
    return 0


def finish(result: Result, folder: Path, *, as_json: bool, more: dict[str, object] | None = None) -> int:
    """Print the report and where it lies; the exit code says how the run ended."""
    from secateur.report import render

    if as_json:
        emit({**json.loads(result.report.to_json()), "out": str(folder), **(more or {})})
    else:
        render(result.report, console=out(), files=files_of(folder))
    return result.report.exit_code


def files_of(folder: Path) -> dict[str, str]:
    """What lies where in an output folder, for the reader."""
    names = {"report": "report.html", "data": "report.json", "plan": "plan.json", "weights": "model.safetensors"}
    return {what: str(folder / name) for what, name in names.items()}


def command_line(
    model: str,
    data: str | None,
    settings: Recipe,
    folder: Path,
    device: str | None = None,
    metric: Sequence[str] | None = None,
) -> str:
    """The shell line that gives the same run again, from the recipe in the output folder."""
    import shlex

    words = ["secateur", "prune", model, *(["--data", data] if data else [])]
    words += ["--device", device] if device else []
    words += [word for each in metric or () for word in ("--metric", each)]
    return shlex.join([*words, "--recipe", str(folder / "recipe.yaml"), "--out", f"{folder}-again"])
