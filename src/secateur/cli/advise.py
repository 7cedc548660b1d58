"""``secateur advise``: what to try first on this model, why, and the recipe for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, say, write
from secateur.cli.typed import only

Budget = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--budget", metavar="SECONDS", help="Time for training the pruned model again; default no limit."),
]


EXAMPLES = ("advise mynet.py:build --data npz:mine.npz --budget 600 --out a.yaml",)


def advise(
    model: options.Model,
    data: options.Data = None,
    budget: Budget = None,
    labels: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--labels/--no-labels", help="Whether the labels may be used; default: if there are any."),
    ] = None,
    protect: options.Protect = None,
    device: options.Device = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", metavar="FILE", help="Write the recipe, for `secateur prune --recipe FILE`."),
    ] = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    force: options.Force = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Recommend a criterion, a granularity and a schedule for MODEL, with reasons and a recipe."""
    from secateur.advice import advise as ask
    from secateur.cli import job as jobs
    from secateur.files import atomic_write

    reads = {"data", "budget", "labels", "protect", "device", "out", "seed", "threads", "force"}
    if out is None:
        only("advise without --out", reads - {"force"}, hint="--force replaces the file of --out.")
    if data is None:
        only("advise without --data", reads - {"labels"}, hint="Give --data, or leave it out.")
    jobs.use_threads(threads)
    # Before the model is loaded: a name that is taken should not cost a minute.
    if out is not None:
        jobs.require_free_file(out, force=force)
    work = jobs.resolve(model, data, seed=seed or 0, device=device)
    found = ask(
        work.model,
        work.example,
        data=None if work.data is None else work.data.train,
        labels=labels,
        budget_seconds=budget,
        protect=protect or (),
    )
    if out is not None:
        atomic_write(out, found.to_yaml())
        say(f"wrote {out}; next: secateur prune {model} {f'--data {data} ' if data else ''}--recipe {out} --out DIR")
    if json:
        emit(found.to_dict())
    else:
        write(f"{found}\n" if out is not None else f"{found}\n\n{found.to_yaml()}")
    return 0
