"""A program of torch.export: one graph with its weights, to run without the model's code."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

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
from secateur.errors import CertificateError, ResourceError, UnsupportedError
from secateur.model.call import call, describe, outputs
from secateur.model.guard import evaluating
from secateur.types import Example


@EXPORTERS.register("pt2")
class Pt2Exporter(Exporter):
    """What `torch.export.load` reads.

    Args:
        dynamic_batch: leave the first dimension of every input open, and check two batch sizes.
        tolerance: allowed difference per 1.0 of the largest output.
    """

    name = "pt2"
    needs_example = True
    packed = True
    uses = (
        "smaller shapes, and packed layers of `deploy` as well: their product stays one operator, "
        "which runs where secateur is imported"
    )
    loses = "zeros of layers that are not packed: they are multiplied like other numbers"

    def __init__(self, *, dynamic_batch: bool = True, tolerance: float = TOLERANCE) -> None:
        self.dynamic_batch, self.tolerance = dynamic_batch, tolerance

    def write(self, model: nn.Module, path: Path, example: Example, *, force: bool) -> Exported:
        """The file, once it was loaded again and gave the outputs of the model."""
        require_tolerance(self.tolerance)
        path.parent.mkdir(parents=True, exist_ok=True)
        sizes, examples = trials(example, dynamic_batch=self.dynamic_batch)
        with tempfile.TemporaryDirectory(prefix=".pt2-", dir=path.parent) as folder, evaluating(model, example=example):
            # The loader asks for the ending.
            draft = Path(folder) / "draft.pt2"
            program = self._traced(model, examples[0])
            try:
                torch.export.save(program, draft)
            except OSError as error:
                raise ResourceError(f"{path.name} could not be written", why=str(error)) from error
            worst, allowed = self._check(model, examples, draft)
            final = draft.rename(draft.with_name(path.name))
            size = publish(final, path)
        facts = {
            "max_abs_error": worst, "tolerance": allowed, "inputs": list(named_inputs(model, example)),
            "checked_batch_sizes": list(sizes),
        }  # fmt: skip
        return Exported(self.name, path, size, "loaded again, it gives the outputs of the model", facts)

    def _traced(self, model: nn.Module, example: Example) -> torch.export.ExportedProgram:
        call(model, example)
        named = named_inputs(model, example)
        mapping = isinstance(example, Mapping)
        shapes = batch_shapes(list(named))
        dynamic = (shapes if mapping else tuple(shapes.values())) if self.dynamic_batch else None
        try:
            with quiet_export(), torch.no_grad():
                return torch.export.export(
                    model,
                    () if mapping else tuple(named.values()),
                    named if mapping else None,
                    dynamic_shapes=dynamic,
                    strict=False,
                )
        except Exception as error:
            # torch's exporter raises whatever its tracer met in the user's code.
            raise UnsupportedError(
                f"torch.export cannot take {type(model).__name__}",
                why=f"{type(error).__name__}: {str(error).strip()[:800]}",
                hint="a forward that fixes the batch size needs dynamic_batch=False" if self.dynamic_batch else "",
            ) from error

    def _check(self, model: nn.Module, examples: list[Example], draft: Path) -> tuple[float, float]:
        with quiet_export():
            again = torch.export.load(draft).module()
        worst, allowed = 0.0, self.tolerance
        for example in examples:
            expected = outputs(call(model, example))
            try:
                with torch.no_grad():
                    found = outputs(call(again, example))
            except Exception as error:
                raise CertificateError(
                    f"the exported program does not run on {describe(example)}", why=str(error)[:400]
                ) from error
            here, room = compare(found, expected, self.tolerance, runtime="the exported program")
            worst, allowed = max(worst, here), max(allowed, room)
        return worst, allowed
