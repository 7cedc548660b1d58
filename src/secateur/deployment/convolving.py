"""Which convolutions of a model are faster packed, by measuring them on the images that reach them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from secateur.deployment import native
from secateur.deployment.contest import Contest, zero_share
from secateur.deployment.convolution import PLANES, SparseConv2d, why_not
from secateur.deployment.decisions import LayerDecision
from secateur.deployment.following import Behind, behind
from secateur.deployment.lookup import key
from secateur.deployment.packed import PackedLayer
from secateur.deployment.reaching import is_hooked, places_of, shapes_reaching
from secateur.types import Example

LEAST_ZEROS = 0.6  # below it there is as much to do as in a dense convolution, which has the better order

Decided = tuple[LayerDecision, PackedLayer | None]


def decide_convolutions(
    model: nn.Module, examples: Sequence[Example], contest: Contest, margin: float
) -> list[Decided]:
    """Every convolution, and its packed form where that is faster than the dense one on all inputs.

    A norm and a ReLU that directly and solely follow a convolution (`following`) are part of both sides.

    Args:
        model: left as it is.
        examples: one for each batch size that counts.
        contest: measures, and knows what was measured before.
        margin: how much faster a convolution must be, as a fraction.
    """
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Conv2d}
    inputs, places = shapes_reaching(model, layers, examples), places_of(model)
    problems = {name: _problem(layer, inputs[name], len(places[id(layer)])) for name, layer in layers.items()}
    follows = behind(model, [name for name, problem in problems.items() if not problem], examples)
    decided: list[Decided] = []
    for name, layer in layers.items():
        if problems[name]:
            decided.append((_decision(name, layer, "", problems[name]), None))
        else:
            decided.append(_decide(name, Stretch.of(model, layer, follows[name]), inputs[name], contest, margin))
    return decided


@dataclass(frozen=True)
class Stretch:
    """A convolution and what its packed form does besides.

    Args:
        layer: the convolution.
        norm: what is folded into it.
        behind: the names of it and of the ReLU.
    """

    layer: nn.Conv2d
    norm: nn.BatchNorm2d | None
    behind: Behind

    @classmethod
    def of(cls, model: nn.Module, layer: nn.Conv2d, behind: Behind) -> Stretch:
        """With the modules that stand behind the names."""
        norm = model.get_submodule(behind.norm) if behind.norm else None
        assert norm is None or isinstance(norm, nn.BatchNorm2d)
        return cls(layer, norm, behind)

    def dense(self) -> nn.Sequential:
        """The same by PyTorch."""
        relu = [nn.ReLU()] if self.behind.relu else []
        return nn.Sequential(self.layer, *([] if self.norm is None else [self.norm]), *relu)

    def packed(self) -> SparseConv2d:
        """The same in one layer."""
        return SparseConv2d.of(self.layer, norm=self.norm, names=(self.behind.norm, self.behind.relu))

    def words(self) -> str:
        """What stands beside the ratio."""
        taken = [word for word, name in (("norm", self.behind.norm), ("ReLU", self.behind.relu)) if name]
        said = f", with its {' and '.join(taken)}" if taken else ""
        return said + (f"; its norm stays: {self.behind.stays}" if self.behind.stays else "")


def _decide(name: str, stretch: Stretch, inputs: Sequence[torch.Size], contest: Contest, margin: float) -> Decided:
    ratios: dict[int, float] = {}
    for shape in dict.fromkeys(inputs):  # of several sizes of images the slowest counts
        ratios[shape[0]] = max(ratios.get(shape[0], 0.0), _ratio(stretch, shape, contest))
    said = ", ".join(f"{ratio:.2f}x of dense at {images} images" for images, ratio in ratios.items()) + stretch.words()
    if max(ratios.values()) > 1 - margin:
        return _decision(name, stretch.layer, "", f"packed it takes {said}", ratios), None
    return _decision(name, stretch.layer, PLANES, said, ratios), stretch.packed()


def _problem(layer: nn.Conv2d, inputs: Sequence[torch.Size], places: int) -> str:
    if native.isa() == native.WITHOUT:
        return f"there are no compiled kernels ({native.why_not() or 'not wanted'})"
    if not inputs:
        return "the example does not call it"
    if any(len(shape) != 4 for shape in inputs):
        return "it is called on an image without a batch"
    if is_hooked(layer):
        return "hooks are registered on it"
    if places > 1:
        return "it stands in two places"
    if zero_share(layer.weight) < LEAST_ZEROS:
        return f"{zero_share(layer.weight):.0%} zeros are few"
    return why_not(layer)


def _ratio(stretch: Stretch, shape: torch.Size, contest: Contest) -> float:
    layer, zeros = stretch.layer, zero_share(stretch.layer.weight)
    come = f"{'x'.join(map(str, shape))}s{layer.stride}p{layer.padding}"
    does = f"{PLANES}{'+norm' * bool(stretch.behind.norm)}{'+relu' * bool(stretch.behind.relu)}"
    size, dtype = tuple(layer.weight.shape), layer.weight.dtype
    name = key(size, dtype, does, zeros=zeros, blocks=1.0, rows=come, operation="conv")
    known = contest.table.get(name)
    if known is None:
        known = _measure(stretch, shape, contest)
        contest.table.put(name, known)
    return known


def _measure(stretch: Stretch, shape: torch.Size, contest: Contest) -> float:
    """Time over that of the better one of PyTorch's two layouts of images, with all that the packed form does."""
    x, last, dense = torch.randn(shape), torch.channels_last, stretch.dense()
    other = copy.deepcopy(dense)
    for weight in other.parameters():
        weight.data = weight.data.to(memory_format=last if weight.dim() == 4 else torch.preserve_format)
    calls: dict[str, Callable[[], object]] = {
        "dense": partial(dense, x), "last": partial(other, x.to(memory_format=last)),
        "packed": partial(stretch.packed(), x),
    }  # fmt: skip
    little = nn.Conv2d(1, 1, 1).requires_grad_(False)
    twin = {
        "dense": partial(little, torch.ones(1, 1, 4, 4)),
        "packed": partial(SparseConv2d.of(little), torch.ones(1, 1, 4, 4)),
    }
    taken = contest.times(calls, {"last": twin["dense"], **twin})
    bar = min((taken["dense"], taken["last"]), key=lambda each: float(np.median(each)))
    return float(np.median(taken["packed"] / bar))


def _decision(
    name: str, layer: nn.Conv2d, format: str, why: str, ratio: dict[int, float] | None = None
) -> LayerDecision:
    weight = layer.weight
    shape = (weight.shape[0], weight[0].numel())
    return LayerDecision(
        name, shape, zero_share(weight), format, str(weight.dtype).removeprefix("torch."), ratio or {}, why
    )
