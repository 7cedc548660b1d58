"""Arguments and options that several commands share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

MODEL_WORDS = "demo:NAME, hf:PATH_OR_ID, timm:NAME, torchvision:NAME or py:package.module:factory"
DATA_WORDS = "demo:NAME, npz:PATH, parquet:PATH, folder:PATH, text:PATH, hf:ID or py:package.module:factory"

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_WORDS}.")]
Data = Annotated[Optional[str], typer.Option("--data", metavar="DATA", help=f"{DATA_WORDS}.")]  # noqa: UP045
RecipeName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--recipe", metavar="FILE|NAME", help="A recipe file, or the name of a bundled one."),
]
Sets = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe; may be repeated."),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--seed", min=0, help="Seed of everything random; default that of the recipe."),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", min=1, help="CPU threads; default torch's own choice."),
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
