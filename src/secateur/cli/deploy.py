"""``secateur deploy``: give the layers of a pruned model the forms that are fastest on this machine."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, table, write

if TYPE_CHECKING:
    from secateur.deployment import Deployment

EXAMPLES = (
    "deploy runs/mine --model mynet.py:build --out runs/fast",
    "deploy runs/m --model n.py:f --weights int8 --profile archive --out q",
)


class Profile(StrEnum):
    """How the folder is written."""

    runtime = "runtime"
    archive = "archive"


def deploy(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder of prune or demo.")],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help=f"The model it was made from: {options.MODEL_WORDS}.")
    ],
    out: options.Out,
    data: options.Data = None,
    weights: Annotated[
        options.Rounding, typer.Option("--weights", help="How far weights may be rounded; same = not at all.")
    ] = options.Rounding.same,
    batch_size: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("--batch-size", min=1, help="A batch size to be fast at; may be repeated."),
    ] = None,
    profile: Annotated[
        Profile,
        typer.Option("--profile", help="runtime: mapped as it runs; archive: the smallest file, decoded by loading."),
    ] = Profile.runtime,
    convolutions: Annotated[
        bool, typer.Option("--convolutions", help="Try convolutions too; a norm behind one may be folded into it.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table/--no-table", help="Keep measurements in your cache folder for the next time.")
    ] = True,
    threads: options.Threads = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure each layer of DIR in each format, swap in what is faster, and write what loads again."""
    import secateur as sc
    from secateur.cli import job as jobs
    from secateur.cli.progress import Stages

    jobs.use_threads(threads)
    jobs.require_free(out, force=force)
    work = jobs.resolve(model, data)
    example = work.needed_example()
    network = jobs.pruned(folder, work).eval()  # what is deployed is for inference, however it was built
    with Stages() as stages:
        done = sc.deploy(
            network, example, weights=weights.value, batch_sizes=batch_size, convolutions=convolutions, table=table,
            progress=stages,
        )  # fmt: skip
    if not dry_run:
        sc.save_deployed(done, out, profile=profile.value, force=force)
    if json:
        emit({"schema": 1, "out": str(out), "dry_run": dry_run, **facts(done)})
    else:
        tell(done)
    return 0


def facts(done: Deployment) -> dict[str, object]:
    """What was decided and measured, as data."""
    return {
        "isa": done.isa,
        "layers": [
            {**asdict(each), "ratio": {str(rows): r for rows, r in each.ratio.items()}} for each in done.decisions
        ],
        "latency": {
            str(size): {name: asdict(one) for name, one in both.items()} for size, both in done.latency.items()
        },
        "size_bytes": list(done.size_bytes),
        "largest_difference": done.largest_difference,
        "note": done.note,
    }


def tell(done: Deployment) -> None:
    """One line per layer, then the whole."""
    rows = [
        (
            each.name,
            f"{each.shape[0]} x {each.shape[1]}",
            f"{each.zeros:.0%}",
            each.format or "left",
            each.dtype,
            each.why,
        )
        for each in done.decisions
    ]
    table(("layer", "shape", "zeros", "format", "weights", "why"), rows)
    write("\n".join(str(done).splitlines()[len(done.decisions) :]) + "\n")
