"""``secateur inspect``: what can be cut, what goes with it, what is locked, and by which line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, out, table, write
from secateur.cli.typed import only

if TYPE_CHECKING:
    from secateur.cli.job import Job
    from secateur.structure.view import View


EXAMPLES = (
    "inspect mynet.py:build",
    "inspect demo:lenet --protect 'classify.*' --html lenet.html",
    "inspect net.py:build --data npz:my.npz --sensitivity --picture s.svg",
)


def inspect(
    model: options.Model,
    data: options.Data = None,
    protect: options.Protect = None,
    device: options.Device = None,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", metavar="FILE", help="Draw the groups as a page: what hangs together, what is locked."),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Measure what is lost where one group alone gets smaller; needs --data."),
    ] = False,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--picture", metavar="FILE.svg", help="With --sensitivity, draw it as well."),
    ] = None,
    granularity: Annotated[str, typer.Option("--granularity", help="With --sensitivity, what a unit is.")] = "channel",
    criterion: Annotated[str, typer.Option("--criterion", help="With --sensitivity, what goes first.")] = "magnitude",
    cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--cache", metavar="DIR", help="With --sensitivity, keep every measurement here."),
    ] = None,
    seed: options.Seed = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Show the groups of MODEL that can be cut, and what is locked by which line of code."""
    import secateur as sc
    from secateur.cli import job as jobs
    from secateur.files import seed_everything

    looks = ("data", "protect", "device", "seed")
    if sensitivity:
        own = ("sensitivity", "picture", "granularity", "criterion", "cache")
        only("--sensitivity", (*looks, *own), hint="Leave one of them out; --picture draws what it finds.")
    else:
        only("inspect without --sensitivity", (*looks, "html"), hint="Add --sensitivity, or leave it out.")
    with seed_everything(seed or 0):
        work = jobs.resolve(model, data, seed=seed or 0, device=device)
        if sensitivity:
            words = {"granularity": granularity, "criterion": criterion}
            return _sensitivity(work, words, protect or (), seed or 0, picture, cache, as_json=json)
        view = sc.inspect(work.model, work.needed_example(), protect=tuple(protect or ()))
    if html is not None:
        _page(view, html)
    if json:
        emit({"schema": 1, **view.to_dict()})
    elif out().is_terminal:
        _tables(view)
    else:
        write(f"{view}\n")
    return 0


def _sensitivity(
    work: Job,
    words: Mapping[str, str],
    protect: Sequence[str],
    seed: int,
    picture: Path | None,
    cache: Path | None,
    *,
    as_json: bool,
) -> int:
    """Measure the groups one by one, print the curves, and draw them."""
    import secateur as sc
    from secateur.cli import job as jobs
    from secateur.cli.console import say
    from secateur.cli.progress import Stages
    from secateur.errors import RecipeError
    from secateur.files.atomic import atomic_write
    from secateur.recipe.overrides import choice_of

    if work.data is None:
        raise RecipeError("--sensitivity measures quality, which needs --data.", hint="for example --data npz:mine.npz")
    jobs.warn_untrained(work)
    if picture is not None:
        jobs.require_free_file(picture, force=False)
    with Stages() as stages:
        found = sc.sensitivity(
            work.model, work.needed_example(), data=work.data, granularity=choice_of(words["granularity"]),
            criterion=choice_of(words["criterion"]), protect=tuple(protect), seed=seed, cache=cache,
            progress=stages.of("sensitivity"),
        )  # fmt: skip
    if picture is not None:
        atomic_write(picture, found.to_svg())
        say(f"drawn in {picture}")
    if as_json:
        emit({"schema": 1, **found.to_dict()})
    else:
        write(f"{found}\n")
    return 0


def _page(view: View, path: Path) -> None:
    from secateur.errors import FileRefusedError
    from secateur.files.atomic import atomic_write

    if path.exists():
        raise FileRefusedError(f"{path} exists already", hint="choose another file, or remove this one")
    atomic_write(path, view.html())


def _tables(view: View) -> None:
    from secateur.report.safe_text import count
    from secateur.structure.usual import aside

    title = f"{view.model}: {count(view.params)} parameters, {count(view.macs)} MACs per {view.macs_per}"
    free = [
        (
            g.name,
            g.granularity,
            str(g.size),
            count(view.weights[g.name]),
            ", ".join(dict.fromkeys(s.tensor for s in g.spans)),
        )
        for g in view.groups
    ]
    table(("can be cut", "granularity", "units", "parameters", "goes together"), free, title=title)
    locked = [
        (
            g.name,
            str(g.size),
            count(view.weights[g.name]),
            g.locks[0].reason,
            " ".join(part for part in (g.locks[0].op, g.locks[0].where) if part),
            g.locks[0].hint,
        )
        for g in view.locked
    ]
    if locked:
        usual = aside(g.locks[0] for g in view.locked)
        table(("locked", "units", "parameters", "why", "where", "do"), locked, title=usual)
