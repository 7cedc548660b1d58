"""``secateur search``: recipes that trade quality for cost best, found on the user's own model and data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, cast

import typer

from secateur.cli import options
from secateur.cli.console import emit, say, write
from secateur.errors import FileRefusedError, RecipeError

if TYPE_CHECKING:
    from secateur.search.on_ray import SearchWords
    from secateur.search.storage import Samplers
    from secateur.search.study import SearchResult

EXAMPLES = ("search demo:lenet --data demo:mnist --space s.yaml --trials 9 --out s",)


SpaceFile = Annotated[Path, typer.Option("--space", metavar="FILE", help="What may be chosen: keys of a recipe.")]
LabelledData = Annotated[str, typer.Option("--data", metavar="DATA", help=f"{options.DATA_WORDS}; with labels.")]
SearchOut = Annotated[Path, typer.Option("--out", metavar="DIR", help="Results; a search that lies there goes on.")]
Objectives = Annotated[
    str,
    typer.Option(
        "--objectives", metavar="A,B,...", help="quality first, then macs, params, nonzero, size or latency_ms."
    ),
]
Minutes = Annotated[Optional[float], typer.Option("--minutes", help="After which no trial is begun.")]  # noqa: UP045
Trials = Annotated[Optional[int], typer.Option("--trials", min=1, help="Of this call at most.")]  # noqa: UP045
Sampler = Annotated[
    str,
    typer.Option(
        "--sampler",
        help="tpe, nsga2, random, or descent: greedy, down to --to.",
        autocompletion=options.complete("tpe", "nsga2", "random", "descent"),
    ),
]
To = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--to", metavar="COST=VALUE", help="Where a descent ends: macs=0.5, params=0.5 or latency_ms=8."),
]
Storage = Annotated[
    str, typer.Option("--storage", metavar="URL", help="Of Optuna, for several workers; default DIR/study.db.")
]
Ray = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Workers on a Ray cluster: local, auto (one that runs here) or its address.",
        autocompletion=options.complete("local", "auto"),
    ),
]
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--workers", min=1, help="With --ray; default one for each CPU of the cluster."),
]


def search(
    model: options.Model,
    data: LabelledData,
    space: SpaceFile,
    out: SearchOut,
    objectives: Objectives = "quality,macs",
    minutes: Minutes = None,
    trials: Trials = None,
    sampler: Sampler = "tpe",
    to: To = None,
    storage: Storage = "",
    ray: Ray = None,
    workers: Workers = None,
    device: options.Device = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Search the space of FILE for recipes of MODEL, and write the front of the best and a recommended one."""
    from secateur.cli import job as jobs
    from secateur.cli.progress import Stages
    from secateur.files import seed_everything
    from secateur.search.page import write_search
    from secateur.search.space import load_space
    from secateur.search.storage import require_optuna
    from secateur.search.study import search as run

    require_optuna()
    found = load_space(space)
    if out.exists() and not out.is_dir():
        raise FileRefusedError(f"{out} exists, and is no folder", hint="choose another --out")
    if ray is None and workers is not None:
        raise RecipeError("--workers says how many --ray starts.", hint="--ray local, or start this command again")
    if ray is not None and sampler == "descent":
        raise RecipeError(
            "--ray and --sampler descent do not go together.",
            why="a descent takes one step after the other, and every step stands on the one before",
            hint="Leave one of them out.",
        )
    where = str(storage or (out / "study.db").absolute())
    crew = None
    if ray is not None:
        from secateur.search.on_ray import RayCrew, SearchWords

        words = SearchWords(
            str(Path.cwd()), model, data, str(space.absolute()), _listed(objectives), sampler, where, minutes, trials,
            seed or 0, device, threads or 1,
        )  # fmt: skip
        crew = RayCrew(ray, workers, words, work_of).start()
    jobs.use_threads(threads)
    with seed_everything(seed or 0):
        text = found.base.calibration.model_dump()
        work = jobs.resolve(model, data, seed=seed or 0, text=text, device=device)
        jobs.warn_untrained(work)
        assert work.data is not None
        with Stages() as stages:
            results = run(
                work.model, work.needed_example(), data=work.data, space=found,
                objectives=_listed(objectives), minutes=minutes, trials=trials, storage=where,
                sampler=_sampler(sampler), to=_bound(to), seed=seed or 0, progress=stages.of("search"), crew=crew,
            )  # fmt: skip
    return show_front(results, write_search(results, out, model=model, data=data), as_json=json)


def show_front(results: SearchResult, files: dict[str, str], *, as_json: bool) -> int:
    """Print the front, the recommended recipe with its reason, and where the files lie."""
    from secateur.search.page import to_data

    if as_json:
        emit({**to_data(results), "files": files, "made": results.made})
        return 0
    lines = [f"{len(results.values)} recipes evaluated, {results.made} trials now, {len(results.front)} on the front"]
    for number in results.front:
        values = ", ".join(f"{name} {value:.4g}" for name, value in results.values[number].items())
        mark = " (recommended)" if number == results.best else ""
        lines.append(f"  trial {number}: {values}; {results.falls[number]}{mark}")
    lines += [
        f"recommended: trial {results.best}: {results.why}",
        *(f"{what}: {where}" for what, where in files.items()),
    ]
    write("\n".join(lines) + "\n")
    say("chosen on samples that nothing trains on; the test part was not read")
    return 0


def work_of(words: SearchWords) -> int:
    """What every worker does, wherever it runs: find model and data by their words, and search in the storage."""
    from secateur.cli import job as jobs
    from secateur.files import seed_everything
    from secateur.search.space import load_space
    from secateur.search.study import search as run

    jobs.use_threads(words.threads)
    found = load_space(Path(words.space))
    with seed_everything(words.seed):
        text = found.base.calibration.model_dump()
        work = jobs.resolve(words.model, words.data, seed=words.seed, text=text, device=words.device)
        assert work.data is not None
        return run(
            work.model, work.needed_example(), data=work.data, space=found, objectives=words.objectives,
            minutes=words.minutes, trials=words.trials, storage=words.storage, sampler=_sampler(words.sampler),
            seed=words.seed,
        ).made  # fmt: skip


def _listed(objectives: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in objectives.split(",") if word.strip())


def _sampler(word: str) -> Samplers:
    return cast("Samplers", word)  # an unknown one is refused by the search, which knows them


def _bound(word: str | None) -> dict[str, float] | None:
    if word is None:
        return None
    name, _, value = word.partition("=")
    try:
        return {name.strip(): float(value)}
    except ValueError:
        raise RecipeError(f"--to {word!r} is no cost and number", hint="for example --to macs=0.5") from None
