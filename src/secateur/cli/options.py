"""Arguments and options that several commands share, described once."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

MODEL_WORDS = "mynet.py:factory, demo:NAME, hf:PATH_OR_ID, timm:NAME, torchvision:NAME or py:package.module:factory"
DATA_WORDS = (
    "npz:, csv:, tsv:, jsonl:, parquet:, folder: or text:PATH, hf:ID, demo:NAME, mydata.py:factory or "
    "py:package.module:factory"
)
# For completion, which has no time to import what knows them.
GRANULARITIES = (
    "channel", "head", "neuron", "layer", "sub_block", "expert", "structured", "element", "2:4", "block", "vector",
    "kernel",
)  # fmt: skip


class Rounding(StrEnum):
    """How far weights may be rounded."""

    same = "same"
    bfloat16 = "bfloat16"
    int8 = "int8"


def complete(*words: str) -> Callable[[str], list[str]]:
    """What a shell offers for an option: the words that begin with what was typed."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Bundled recipes that begin with what was typed."""
    from secateur.recipe import bundled

    return [name for name in bundled() if name.startswith(incomplete)]


def help_of(*examples: str) -> str:
    """The last lines of a command's help: what to type."""
    return "\n\n".join(["Examples:" if len(examples) > 1 else "Example:", *(f"secateur {line}" for line in examples)])


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=f"{MODEL_WORDS}.", autocompletion=complete("demo:convnet", "demo:lenet")),
]
Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--data", metavar="DATA", help=f"{DATA_WORDS}.", autocompletion=complete("demo:mnist", "demo:digits")),
]
RecipeName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--recipe", metavar="FILE|NAME", help="A recipe file, or the name of a bundled one.", autocompletion=recipes
    ),
]
Protect = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--protect", metavar="PATTERN", help="A module or parameter that stays whole; may be repeated."),
]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the model runs: cpu, cuda, cuda:1 ...; default where it lies.",
        autocompletion=complete("cpu", "cuda", "mps"),
    ),
]
Sets = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe; may be repeated."),
]
Track = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="Log the run to tensorboard, wandb, mlflow or trackio; may be repeated.",
        autocompletion=complete("tensorboard", "wandb", "mlflow", "trackio"),
    ),
]
Metric = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--metric",
        metavar="METRIC",
        help="How quality is measured: accuracy, top5, f1, precision, recall, mse, mae, a name of the package "
        "evaluate, FILE.py:NAME or py:package.module:NAME (a metric, what makes one, or evaluate(model)); may be "
        "repeated.",
        autocompletion=complete("accuracy", "top5", "f1", "precision", "recall", "mse", "mae"),
    ),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--seed", min=0, help="Seed of everything random; default that of the recipe."),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", min=1, help="CPU threads; default torch's own choice."),
]
MaxDrop = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--max-drop",
        metavar="POINTS",
        help="In the place of a target: the smallest model that loses at most so many points (or percent of a loss).",
    ),
]
Smallest = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--smallest",
        metavar="TARGET",
        help="With --max-drop, what is made small: macs, params, sparsity or latency_ms.",
        autocompletion=complete("macs", "params", "sparsity", "latency_ms"),
    ),
]
Confidence = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--confidence", help="With --max-drop, how sure the limit is to be kept; default 0.95."),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds of the latency.")]
BatchSize = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--batch-size", min=1, help="Batch of the timed forward pass; default that of the example."),
]
Out = Annotated[Path, typer.Option("--out", metavar="PATH", help="Where the result goes; must not exist yet.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier result of secateur.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; change and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Data as JSON on standard output, all else on standard error.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")]
