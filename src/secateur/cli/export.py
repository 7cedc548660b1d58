"""``secateur export``: take a pruned model elsewhere."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, write

# For the help, which has no time to import what knows them; a test holds both together.
FORMATS = ("safetensors", "archive", "onnx", "pt2", "hf", "gguf")
EXAMPLES = (
    "export runs/mine --model mynet.py:build --format onnx --out mine.onnx",
    "export runs/lm --model hf:lm --format gguf --dtype q8_0 --out q.gguf",
    "export runs/m --model n.py:f --format archive --weights int8 --out a",
)


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder of prune, demo or deploy.")],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help=f"The model it was made from: {options.MODEL_WORDS}.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file to write; a folder for archive and hf.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help=f"{', '.join(FORMATS)}; onnx and gguf need the extras of these names.",
            autocompletion=options.complete(*FORMATS),
        ),
    ] = FORMATS[0],
    weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--weights", help="Of archive: same (lossless), bfloat16, or int8 for linear layers."),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--dtype", help="Of gguf: same, float32, float16, bfloat16 or q8_0."),
    ] = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Of onnx and pt2: the batch size of the example, and no other.")
    ] = False,
    data: options.Data = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Write the pruned model of DIR for another runtime, check it there, and say what that runtime can use of it."""
    import secateur as sc
    from secateur.cli import job as jobs
    from secateur.cli.progress import Stages
    from secateur.deployment import EXPORTERS
    from secateur.errors import RecipeError
    from secateur.measure import num_params

    settings: dict[str, object] = {
        name: value for name, value in (("weights", weights), ("dtype", dtype)) if value is not None
    }
    settings |= {"dynamic_batch": False} if fixed_batch else {}
    if fixed_batch and "dynamic_batch" not in signature(EXPORTERS.find(format)).parameters:
        raise RecipeError(f"--fixed-batch belongs to onnx and pt2, and not to {format}.", hint="Leave it out.")
    exporter = EXPORTERS.build(format, settings)
    if exporter.writes == "folder":
        jobs.require_free(out, force=force)
    else:
        jobs.require_free_file(out, force=force)
    work = jobs.resolve(model, data)
    network = jobs.pruned(folder, work)
    example = work.needed_example() if exporter.needs_example else work.example
    plan: dict[str, object] = {"format": format, "out": str(out), "params": num_params(network)}
    said = {"uses": exporter.uses, "cannot_use": exporter.loses}
    if dry_run:
        return _tell({**plan, "dry_run": True, **said}, as_json=json)
    with Stages() as stages:
        stages(f"export to {format}", 0, 0)
        done = sc.export(network, out, format=format, example=example, force=force, **settings)
    found = {"size_bytes": done.size_bytes, **done.facts, "checked": done.checked}
    return _tell({**plan, **found, **said}, as_json=json)


def _tell(found: dict[str, object], *, as_json: bool) -> int:
    if as_json:
        emit({"schema": 1, **found})
    else:
        write("\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in found.items()) + "\n")
    return 0
