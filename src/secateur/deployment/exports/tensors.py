"""The weights by themselves: plain safetensors, and the archive that is as small as it gets."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from secateur.deployment.contest import zero_share
from secateur.deployment.exports.base import EXPORTERS, Exported, Exporter, size_of_files
from secateur.deployment.folders import ARCHIVE, save_deployed
from secateur.deployment.linear import SparseLinear
from secateur.deployment.packed import densify, install
from secateur.deployment.planner import size_of
from secateur.files import save_tensors
from secateur.loading import WEIGHTS
from secateur.planning.history import origin_of
from secateur.registry import one_of
from secateur.types import Example

ROUNDINGS = ("same", "bfloat16", "int8")
SPARSE = 0.4  # share of zeros from which a bit per number costs less than the numbers that it saves in eight bits


@EXPORTERS.register("safetensors")
class SafetensorsExporter(Exporter):
    """Names and tensors, for programs that build the layers themselves."""

    name = "safetensors"
    uses = "smaller shapes: the tensors have those of the cut model, and the file is as much smaller"
    loses = "zeros: they are stored like other numbers (see archive)"

    def write(self, model: nn.Module, path: Path, example: Example, *, force: bool) -> Exported:
        """The file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = save_tensors(path, {name: t.detach() for name, t in model.state_dict(keep_vars=True).items()})
        return Exported(self.name, path, path.stat().st_size, "its SHA-256 is below", {"sha256": digest})


@EXPORTERS.register("archive")
class ArchiveExporter(Exporter):
    """A folder for `sc.load_deployed`, whose weights are coded.

    Args:
        weights: "same" loses nothing; "bfloat16" rounds the model to bfloat16; "int8" rounds the weights of linear
            layers to eight bits with a scale per output, and leaves the rest.
    """

    name = "archive"
    writes = "folder"
    packed = True
    uses = "zeros and smaller shapes, for storing and sending: places, exponents and mantissas are coded without a loss"
    loses = "speed: it is decoded by loading, and runs as what it was"

    def __init__(self, *, weights: str = "same") -> None:
        one_of("weights", weights, ROUNDINGS)
        self.weights = weights

    def write(self, model: nn.Module, path: Path, example: Example, *, force: bool) -> Exported:
        """The folder."""
        plan, made = origin_of(model), self._rounded(model)
        save_deployed(made, path, profile=ARCHIVE, plan=plan, force=force)
        # Against what the model takes dense, in its own dtype: rounding is part of what was asked for.
        dense = size_of(densify(copy.deepcopy(model)))
        facts = {"weights": self.weights, "times_smaller": round(dense / (path / WEIGHTS).stat().st_size, 3)}
        return Exported(
            self.name, path, size_of_files(path), "every tensor has its SHA-256, checked by sc.load_deployed", facts
        )

    def _rounded(self, model: nn.Module) -> nn.Module:
        if self.weights == "same":
            return model
        made = copy.deepcopy(model)
        if self.weights == "bfloat16":
            return made.to(torch.bfloat16)
        shared = _shared(made)
        layers = {
            name: layer
            for name, layer in made.named_modules()
            if type(layer) is nn.Linear and id(layer.weight) not in shared
        }
        install(made, {name: _eight_bits(layer) for name, layer in layers.items()})
        return made


def _eight_bits(layer: nn.Linear) -> SparseLinear:
    return SparseLinear.of(layer, "bitmask" if zero_share(layer.weight) >= SPARSE else "dense", torch.int8)


def _shared(model: nn.Module) -> set[int]:
    """Weights that several modules have: a packed layer would be a second copy of them."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {one for one, count in seen.items() if count > 1}
