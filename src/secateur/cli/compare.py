"""``secateur compare``: criteria on the user's own model, compared fairly."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, say, write
from secateur.errors import EXIT_DEGRADED, EXIT_OK, RecipeError

if TYPE_CHECKING:
    from secateur.comparison import Comparison
    from secateur.comparison.study import Study

Words = Optional[str]  # noqa: UP045
Criteria = Annotated[
    str, typer.Option("--criteria", metavar="A,B,...", help="Names, or name:option=value; all = every one.")
]
Levels = Annotated[Words, typer.Option("--levels", metavar="0.5,0.8,...", help="Fractions removed; default six.")]
FILES = ("compare.html", "results.csv", "compare.md", "summary.json", "manifest.json")


EXAMPLES = (
    "compare demo:convnet --data demo:mnist --preset quick --out runs/c",
    "compare net.py:build --data npz:my.npz --criteria l1,taylor --out c",
    "compare net.py:build --data npz:my.npz --metric f1 --out c",
)


def compare(
    model: options.Model,
    data: Annotated[str, typer.Option("--data", metavar="DATA", help=f"{options.DATA_WORDS}; with labels.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Results; runs that lie there are not done again.")],
    criteria: Criteria = "magnitude,fpgm,taylor",
    levels: Levels = None,
    granularity: Annotated[str, typer.Option("--granularity", help="channel, head, element, 2:4...")] = "channel",
    match: Annotated[str, typer.Option("--match", help="What levels count: auto, units, macs or params.")] = "auto",
    scope: Annotated[str, typer.Option("--scope", help="Where units compete: global or local.")] = "global",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many.")] = 3,
    recover: Annotated[
        Words, typer.Option("--recover", metavar="FILE|NAME", help="A recipe whose recovery steps are run too.")
    ] = None,
    recover_levels: Annotated[
        Words, typer.Option("--recover-levels", metavar="0.5,...", help="Levels with recovery; default all.")
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--epochs", min=1, help="Passes that train a demo network first; default 3, 2 with --preset."),
    ] = None,
    probes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--probes",
            min=0,
            help="Units set to zero one by one, to see what scores tell; 0 = none; default 64, 32 with --preset.",
        ),
    ] = None,
    preset: Annotated[
        Words, typer.Option("--preset", help="quick: a few batches of everything, under two minutes.")
    ] = None,
    metric: options.Metric = None,
    protect: options.Protect = None,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Compare criteria on MODEL: same bases, samples, batches and budgets, with controls and tests."""
    from secateur.cli import job as jobs
    from secateur.cli.progress import Stages
    from secateur.comparison import study as compare_study

    if recover_levels is not None and recover is None and preset is None:
        raise RecipeError(
            "--recover-levels says where --recover is run.", hint="Give --recover FILE|NAME, or leave it out."
        )
    # Networks of a preset are so small that threads wait for each other longer than they compute.
    jobs.use_threads(threads or (1 if preset else None))
    study = compare_study.Study(
        model=model,
        data=data,
        criteria=tuple(word.strip() for word in criteria.split(",") if word.strip()),
        levels=fractions("--levels", levels),
        granularity=granularity,
        match=match,
        scope=scope,
        seeds=seeds,
        recover=() if recover is None else compare_study.recovery_of(recover),
        recover_levels=fractions("--recover-levels", recover_levels),
        epochs=epochs,
        probes=probes,
        protect=tuple(protect or ()),
        metric=tuple(metric or ()),
        device=device,
    )
    # Before the preset changes the study: the line should say --preset, and not what that stood for.
    command = _command(study, out, recover, preset)
    if preset is not None:
        study = compare_study.preset(study, preset)
    with Stages() as stages:
        found = compare_study.run_study(study, out, command=command, progress=stages)
    return show_findings(found, as_json=json)


def show_findings(found: Comparison, *, as_json: bool) -> int:
    """Print the findings and where the files lie; runs that diverged or were not paired set exit code 7."""
    diverged = sum(row["status"] == "diverged" for row in found.rows)
    broken = found.summary["pairing"]["broken"]
    if as_json:
        emit({"out": str(found.out), "runs": len(found.rows), "reused": found.reused, "summary": found.summary})
    else:
        write((found.out / "compare.md").read_text(encoding="utf-8"))
        write("\n" + "\n".join(f"{found.out / name}" for name in FILES) + "\n")
    # Refused runs are no fault of the comparison: a level out of reach is a result.
    if diverged or broken:
        say(f"degraded: {diverged} runs diverged, {len(broken)} recoveries were not paired", style="yellow")
        return EXIT_DEGRADED
    return EXIT_OK


def fractions(option: str, text: str | None) -> tuple[float, ...] | None:
    """Comma-separated fractions.

    Raises:
        RecipeError: something else.
    """
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise RecipeError(f"{option} {text!r} is no list of numbers", hint=f"for example {option} 0.5,0.8") from error


def _command(study: Study, out: Path, recover: str | None, preset: str | None) -> str:
    from secateur.comparison.study import Study

    words = ["secateur", "compare", study.model, "--data", study.data, "--criteria", ",".join(study.criteria)]
    for option, values in (("--levels", study.levels), ("--recover-levels", study.recover_levels)):
        words += [option, ",".join(f"{value:g}" for value in values)] if values else []
    # Only what differs from the defaults: a line that is read, copied and changed should be short.
    usual = Study(study.model, study.data)
    for name in ("granularity", "match", "scope", "seeds", "epochs", "probes"):
        if getattr(study, name) != getattr(usual, name):
            words += [f"--{name}", str(getattr(study, name))]
    words += ["--recover", recover] if recover else []
    words += ["--preset", preset] if preset else []
    words += [word for pattern in study.protect for word in ("--protect", pattern)]
    words += [word for each in study.metric for word in ("--metric", each)]
    words += ["--device", study.device] if study.device else []
    return shlex.join([*words, "--out", str(out)])
