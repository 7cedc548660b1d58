"""Export to ONNX, checked against onnxruntime before the file appears."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, FileRefusedError, RecipeError, ResourceError, UnsupportedError
from secateur.model.call import call, describe, outputs
from secateur.model.guard import evaluating
from secateur.model.samples import with_batch_size
from secateur.types import Example

# protobuf refuses messages of 2 GiB and more; larger weights go to a file beside the model.
_INLINE_LIMIT = 1_500_000_000


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
    tolerance: float = 1e-4,
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
    if tolerance <= 0:
        raise RecipeError(f"the tolerance is {tolerance}", hint="give a positive number, such as 1e-4")
    runtime = _runtime()
    path.parent.mkdir(parents=True, exist_ok=True)
    # An exporter that sees batch size 1 fixes it, so the traced batch has at least two.
    sizes = (2, 3) if dynamic_batch else ()
    examples = [with_batch_size(example, size) for size in sizes] or [example]
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder, evaluating(model, example=example):
        draft = Path(folder) / path.name
        names = _export(model, examples[0], draft, dynamic=dynamic_batch)
        error, allowed = _check(model, examples, draft, runtime=runtime, names=names, tolerance=tolerance)
        size = _publish(Path(folder), path)
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


def _arguments(model: nn.Module, example: Example) -> dict[str, Any]:
    """The example as forward's named arguments, in the order of the signature."""
    if isinstance(example, Mapping):
        return dict(example)
    args = example if isinstance(example, (tuple, list)) else (example,)
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    if len(names) < len(args):
        names = [f"input{number}" for number in range(len(args))]
    return dict(zip(names, args, strict=False))


def _export(model: nn.Module, example: Example, draft: Path, *, dynamic: bool) -> tuple[str, ...]:
    call(model, example)
    named = _arguments(model, example)
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                f"the input {name!r} of the example is {describe(value)}, no tensor",
                hint="wrap the model so that its forward takes tensors only",
            )
    mapping = isinstance(example, Mapping)
    shapes = {name: {0: torch.export.Dim("batch")} for name in named}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep messages back that say nothing about the user's model."""
    # Logged for every operator of torchvision when that is not installed.
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch's exporter copies its own tree specs through a deprecated function of torch.
            warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
            # Every input's first dimension is the same batch: one name for them is what is wanted.
            warnings.filterwarnings("ignore", message=r"# The axis name: batch\w* will not be used")
            yield
    finally:
        logger.setLevel(level)


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
        values = dict(zip(names, _arguments(model, example).values(), strict=True))
        feeds = {name: values[name].detach().numpy() for name in graph_inputs}
        try:
            found = session.run(None, feeds)
        except Exception as error:
            raise CertificateError(
                f"onnxruntime cannot run the exported model on {describe(example)}", why=str(error)
            ) from error
        if len(found) != len(expected):
            raise CertificateError(f"the exported model has {len(found)} outputs, torch has {len(expected)}")
        for number, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
            error_here, allowed_here = _compare(number, np.asarray(theirs), ours, tolerance)
            worst, allowed = max(worst, error_here), max(allowed, allowed_here)
    return worst, allowed


def _compare(number: int, theirs: Any, ours: Tensor, tolerance: float) -> tuple[float, float]:
    wanted = ours.detach().double().numpy()
    if theirs.shape != wanted.shape:
        raise CertificateError(f"output {number} is {theirs.shape} in ONNX and {wanted.shape} in torch")
    if wanted.size == 0:
        return 0.0, tolerance
    error = float(np.abs(theirs.astype(np.float64) - wanted).max())
    allowed = tolerance * max(1.0, float(np.abs(wanted).max()))
    if not error <= allowed:
        raise CertificateError(
            f"output {number} differs by {error:.3g} between onnxruntime and torch",
            why=f"allowed are {allowed:.3g}",
            hint="no file was written; please report the model, or raise the tolerance if it is in float16",
        )
    return error, allowed


def _publish(folder: Path, path: Path) -> int:
    """Move the weights first and the graph last: a graph that is there is complete."""
    files = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        if file.is_dir():
            shutil.rmtree(file)
            continue
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.replace(path.parent / file.name)
    return size
