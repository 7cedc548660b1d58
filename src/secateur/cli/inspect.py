"""``secateur inspect``: what can be cut, what goes with it, what is locked, and by which line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, out, table, write

if TYPE_CHECKING:
    from secateur.structure.view import View


EXAMPLES = ("inspect mynet.py:build", "inspect demo:lenet --protect 'classify.*' --html lenet.html")


def inspect(
    model: options.Model,
    data: options.Data = None,
    protect: options.Protect = None,
    device: options.Device = None,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", metavar="FILE", help="Draw the groups as a page: what hangs together, what is locked."),
    ] = None,
    seed: options.Seed = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Show the groups of MODEL that can be cut, and what is locked by which line of code."""
    import secateur as sc
    from secateur.cli import job as jobs
    from secateur.files import seed_everything

    with seed_everything(seed or 0):
        work = jobs.resolve(model, data, seed=seed or 0, device=device)
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


def _page(view: View, path: Path) -> None:
    from secateur.errors import FileRefusedError
    from secateur.files.atomic import atomic_write

    if path.exists():
        raise FileRefusedError(f"{path} exists already", hint="choose another file, or remove this one")
    atomic_write(path, view.html())


def _tables(view: View) -> None:
    from secateur.report.safe_text import count

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
        table(("locked", "units", "parameters", "why", "where", "do"), locked)
