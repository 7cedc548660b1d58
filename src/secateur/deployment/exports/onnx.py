"""Export to ONNX, checked against onnxruntime before the file appears."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.deployment.exports.base import EXPORTERS, Exported, Exporter, publish
from secateur.deployment.exports.checks import (
    TOLERANCE,
    batch_shapes,
    compare,
    named_inputs,
    quiet_export,
    require_tolerance,
    trials,
)
from secateur.errors import CertificateError, FileRefusedError, ResourceError, UnsupportedError
from secateur.model.call import call, describe, outputs
from secateur.model.guard import evaluating
from secateur.types import Example

# protobuf refuses messages of 2 GiB and more; larger weights go to a file beside the model.
_INLINE_LIMIT = 1_500_000_000


@EXPORTERS.register("onnx")
class OnnxExporter(Exporter):
    """A graph for onnxruntime and whatever else reads ONNX.

    Args:
        dynamic_batch: leave the first dimension of every input open.
        tolerance: allowed difference per 1.0 of the largest output.
    """

    name = "onnx"
    needs_example = True
    uses = "smaller shapes: cut channels, neurons, heads and layers make the file and the work of every runtime smaller"
    loses = "zeros: they are stored and multiplied like other numbers (sparse initializers are expanded on loading)"

    def __init__(self, *, dynamic_batch: bool = True, tolerance: float = TOLERANCE) -> None:
        self.dynamic_batch, self.tolerance = dynamic_batch, tolerance

    def write(self, model: nn.Module, path: Path, example: Example, *, force: bool) -> Exported:
        """The file, once onnxruntime has given the outputs of torch."""
        done = export_onnx(
            model, example, path, dynamic_batch=self.dynamic_batch, tolerance=self.tolerance, overwrite=force
        )
        sizes = list(done.batch_sizes)
        facts = {
            "max_abs_error": done.max_abs_error, "tolerance": done.tolerance, "inputs": list(done.inputs),
            "checked_batch_sizes": sizes,
        }  # fmt: skip
        return Exported(self.name, path, done.size_bytes, "onnxruntime gives the outputs of torch", facts)


@dataclass(frozen=True)
class OnnxExport:
    """What an export brought.

    Args:
        path: the file.
        size_bytes: bytes of the file, and of the weights beside it if there are any.
        max_abs_error: largest difference between torch and onnxruntime over all outputs.
        tolerance: what was allowed.
        inputs: names of the inputs of the graph.
        batch_sizes: batch sizes on which both were run.
    """

    path: Path
    size_bytes: int
    max_abs_error: float
    tolerance: float
    inputs: tuple[str, ...]
    batch_sizes: tuple[int, ...]


def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> OnnxExport:
    """Write the model as an ONNX file that onnxruntime has run with the same outputs.

    The model is exported in eval mode; the file appears only after the check. Zeros of a masked model are
    stored and multiplied like any number: cut the model if the file is to be smaller or faster.

    Args:
        model: on the CPU; left as it is.
        example: what `secateur.model.call.call` takes; its tensors are the inputs of the graph.
        path: where the file goes; weights above 1.5 GB go beside it as ``NAME.data``.
        dynamic_batch: leave the first dimension of every input open, and check two batch sizes.
        tolerance: allowed difference, absolute, per 1.0 of the largest output magnitude (at least 1.0).
        overwrite: replace a file that is there.

    Returns:
        What was written and how well it agrees.

    Raises:
        UnsupportedError: the extra ``onnx`` is not installed, or torch cannot export the model.
        CertificateError: onnxruntime gives other outputs; no file is written.
        FileRefusedError: the file exists.
        ForwardError: the forward fails on the example.

    Cost: seconds to minutes, most of it in torch's exporter; a copy of the weights on disk.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileRefusedError(f"{path} exists", hint="choose another name, or overwrite=True")
    require_tolerance(tolerance)
    runtime = _runtime()
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes, examples = trials(example, dynamic_batch=dynamic_batch)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder, evaluating(model, example=example):
        draft = Path(folder) / path.name
        names = _export(model, examples[0], draft, dynamic=dynamic_batch)
        error, allowed = _check(model, examples, draft, runtime=runtime, names=names, tolerance=tolerance)
        size = publish(draft, path)
    return OnnxExport(path, size, error, allowed, names, sizes)


def _runtime() -> object:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"ONNX export needs the package {error.name}", hint="pip install 'secateur[onnx]'"
        ) from error
    return onnxruntime


def _export(model: nn.Module, example: Example, draft: Path, *, dynamic: bool) -> tuple[str, ...]:
    call(model, example)
    named = named_inputs(model, example)
    mapping = isinstance(example, Mapping)
    shapes = batch_shapes(list(named))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        with quiet_export():
            torch.onnx.export(
                model,
                () if mapping else tuple(named.values()),
                str(draft),
                kwargs=named if mapping else None,
                input_names=list(named),
                dynamic_shapes=(shapes if mapping else tuple(shapes.values())) if dynamic else None,
                dynamo=True,
                external_data=weights > _INLINE_LIMIT,
                verbose=False,
            )
    except OSError as error:
        raise ResourceError(f"{draft.name} could not be written", why=str(error)) from error
    except Exception as error:
        raise UnsupportedError(
            f"torch cannot export {type(model).__name__} to ONNX",
            why=f"{type(error).__name__}: {str(error).strip()[:800]}",
            hint="a forward that fixes the batch size needs dynamic_batch=False" if dynamic else "",
        ) from error
    return tuple(named)


def _check(
    model: nn.Module,
    examples: list[object],
    draft: Path,
    *,
    runtime: Any,
    names: tuple[str, ...],
    tolerance: float,
) -> tuple[float, float]:
    """Largest difference over all examples and what was allowed there."""
    try:
        session = runtime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedError("onnxruntime cannot load the exported model", why=str(error)) from error
    worst, allowed = 0.0, tolerance
    graph_inputs = [entry.name for entry in session.get_inputs()]
    for example in examples:
        expected = outputs(call(model, example))
        values = dict(zip(names, named_inputs(model, example).values(), strict=True))
        feeds = {name: values[name].detach().numpy() for name in graph_inputs}
        try:
            found = session.run(None, feeds)
        except Exception as error:
            raise CertificateError(
                f"onnxruntime cannot run the exported model on {describe(example)}", why=str(error)
            ) from error
        # Copied: the runtime's arrays may be read only, which torch warns of.
        theirs = [torch.from_numpy(np.array(each)) for each in found]
        error_here, allowed_here = compare(theirs, expected, tolerance, runtime="onnxruntime")
        worst, allowed = max(worst, error_here), max(allowed, allowed_here)
    return worst, allowed
