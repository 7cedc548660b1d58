"""What exporters that run the model share: its named inputs, two batch sizes, and the comparison of outputs."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, RecipeError, UnsupportedError
from secateur.model.call import describe
from secateur.model.samples import with_batch_size
from secateur.types import Example

TOLERANCE = 1e-4


def named_inputs(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """The example as forward's named arguments, in the order of the signature.

    Raises:
        UnsupportedError: something else than tensors goes in.
    """
    if isinstance(example, Mapping):
        named: dict[str, object] = dict(example)
    else:
        args = example if isinstance(example, (tuple, list)) else (example,)
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        if len(names) < len(args):
            names = [f"input{number}" for number in range(len(args))]
        named = dict(zip(names, args, strict=False))
    found = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for name, value in named.items():
        if name not in found:
            raise UnsupportedError(
                f"the input {name!r} of the example is {describe(value)}, no tensor",
                hint="wrap the model so that its forward takes tensors only",
            )
    return found


def trials(example: Example, *, dynamic_batch: bool) -> tuple[tuple[int, ...], list[Example]]:
    """Batch sizes to run, and the example in each of them; the first is traced."""
    # An exporter that sees batch size 1 fixes it, so the traced batch has at least two.
    sizes = (2, 3) if dynamic_batch else ()
    return sizes, [with_batch_size(example, size) for size in sizes] or [example]


def require_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that nothing can meet."""
    if tolerance <= 0:
        raise RecipeError(f"the tolerance is {tolerance}", hint="give a positive number, such as 1e-4")


def compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, *, runtime: str
) -> tuple[float, float]:
    """Largest difference between the outputs of two runtimes, and what was allowed there.

    Args:
        found: what the target gives.
        expected: what torch gives.
        tolerance: absolute, per 1.0 of the largest output (at least 1.0).
        runtime: the target's name, for messages.

    Raises:
        CertificateError: another number of outputs, other shapes, or a larger difference.
    """
    if len(found) != len(expected):
        raise CertificateError(f"the exported model has {len(found)} outputs, torch has {len(expected)}")
    worst, allowed = 0.0, tolerance
    for number, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        if theirs.shape != ours.shape:
            raise CertificateError(
                f"output {number} is {tuple(theirs.shape)} in {runtime} and {tuple(ours.shape)} in torch"
            )
        if ours.numel() == 0:
            continue
        wanted = ours.detach().double()
        error = float((theirs.detach().double() - wanted).abs().max())
        room = tolerance * max(1.0, float(wanted.abs().max()))
        # Written so that a difference that is no number is refused.
        if not error <= room:
            raise CertificateError(
                f"output {number} differs by {error:.3g} between {runtime} and torch",
                why=f"allowed are {room:.3g}",
                hint="no file was written; please report the model, or raise the tolerance if it is in float16",
            )
        worst, allowed = max(worst, error), max(allowed, room)
    return worst, allowed


@contextmanager
def quiet_export() -> Iterator[None]:
    """Keep messages of torch's exporters back that say nothing about the user's model."""
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


def batch_shapes(names: Sequence[str]) -> dict[str, dict[int, object]]:
    """The first dimension of every input is the batch, and open."""
    return {name: {0: torch.export.Dim("batch")} for name in names}
