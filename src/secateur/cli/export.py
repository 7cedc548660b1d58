"""``secateur export``: take a pruned model elsewhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import options
from secateur.cli.console import emit, write

if TYPE_CHECKING:
    from torch import nn

    from secateur.types import Example


class ExportFormat(StrEnum):
    """What can be written."""

    safetensors = "safetensors"
    onnx = "onnx"


EXAMPLES = ("export runs/mine --model mynet.py:build --format onnx --out mine.onnx",)


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder of prune or demo.")],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help=f"The model it was made from: {options.MODEL_WORDS}.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
    format: Annotated[ExportFormat, typer.Option("--format", help="onnx needs the extra 'secateur[onnx]'.")] = (
        ExportFormat.safetensors
    ),
    data: options.Data = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Write the pruned model of DIR as safetensors, or as ONNX checked against onnxruntime."""
    import secateur as sc
    from secateur.cli import job as jobs
    from secateur.cli.measure import tell_doubt
    from secateur.cli.progress import Stages
    from secateur.measure import num_params

    jobs.require_free_file(out, force=force)
    work = jobs.resolve(model, data)
    network = sc.load(folder, model=work.model, example=work.example)
    tell_doubt(network)
    plan = {"format": format.value, "out": str(out), "params": num_params(network)}
    if dry_run:
        return _tell({**plan, "dry_run": True}, as_json=json)
    with Stages() as stages:
        stages(f"export to {format.value}", 0, 0)
        if format is ExportFormat.onnx:
            found = _onnx(network, work.needed_example(), out, force=force)
        else:
            found = _safetensors(network, out)
    return _tell({**plan, **found}, as_json=json)


def _safetensors(network: nn.Module, path: Path) -> dict[str, object]:
    from secateur.files import save_tensors

    tensors = {name: tensor.detach() for name, tensor in network.state_dict(keep_vars=True).items()}
    digest = save_tensors(path, tensors)
    return {"size_bytes": path.stat().st_size, "sha256": digest}


def _onnx(network: nn.Module, example: Example, path: Path, *, force: bool) -> dict[str, object]:
    from secateur.deployment import export_onnx

    written = export_onnx(network, example, path, overwrite=force)
    return {
        "size_bytes": written.size_bytes,
        "max_abs_error": written.max_abs_error,
        "tolerance": written.tolerance,
        "inputs": list(written.inputs),
        "checked_batch_sizes": list(written.batch_sizes),
    }


def _tell(found: dict[str, object], *, as_json: bool) -> int:
    if as_json:
        emit({"schema": 1, **found})
    else:
        write("\n".join(f"{key}: {value}" for key, value in found.items()) + "\n")
    return 0
