"""Which convolutions of a model are faster packed, by measuring them on the images that reach them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from secateur.deployment import native
from secateur.deployment.contest import Contest, zero_share
from secateur.deployment.convolution import SparseConv2d, why_not
from secateur.deployment.decisions import LayerDecision
from secateur.deployment.lookup import key
from secateur.deployment.reaching import shapes_reaching
from secateur.types import Example

LEAST_ZEROS = 0.6  # below it there is as much to do as in a dense convolution, which has the better order

Decided = tuple[LayerDecision, nn.Module | None]


def decide_convolutions(
    model: nn.Module, examples: Sequence[Example], contest: Contest, margin: float
) -> list[Decided]:
    """Every convolution, and its packed form where that is faster than the dense one on all inputs.

    Args:
        model: left as it is.
        examples: one for each batch size that counts.
        contest: measures, and knows what was measured before.
        margin: how much faster a convolution must be, as a fraction.
    """
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Conv2d}
    inputs = shapes_reaching(model, layers, examples)
    return [_decide(name, layer, inputs[name], contest, margin) for name, layer in layers.items()]


def _decide(name: str, layer: nn.Conv2d, inputs: Sequence[torch.Size], contest: Contest, margin: float) -> Decided:
    problem = _problem(layer, inputs)
    if problem:
        return _decision(name, layer, "", problem), None
    ratios: dict[int, float] = {}
    for shape in dict.fromkeys(inputs):  # of several sizes of images the slowest counts
        ratios[shape[0]] = max(ratios.get(shape[0], 0.0), _ratio(layer, shape, contest))
    said = ", ".join(f"{ratio:.2f}x of dense at {images} images" for images, ratio in ratios.items())
    if max(ratios.values()) > 1 - margin:
        return _decision(name, layer, "", f"packed it takes {said}", ratios), None
    return _decision(name, layer, "planes", said, ratios), SparseConv2d(layer)


def _problem(layer: nn.Conv2d, inputs: Sequence[torch.Size]) -> str:
    if native.isa() == native.WITHOUT:
        return f"there are no compiled kernels ({native.why_not() or 'not wanted'})"
    if not inputs:
        return "the example does not call it"
    if any(len(shape) != 4 for shape in inputs):
        return "it is called on an image without a batch"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "hooks are registered on it"
    if zero_share(layer.weight) < LEAST_ZEROS:
        return f"{zero_share(layer.weight):.0%} zeros are few"
    return why_not(layer)


def _ratio(layer: nn.Conv2d, shape: torch.Size, contest: Contest) -> float:
    zeros = zero_share(layer.weight)
    come = f"{'x'.join(map(str, shape))}s{layer.stride}p{layer.padding}"
    name = key(
        tuple(layer.weight.shape), layer.weight.dtype, "planes", zeros=zeros, blocks=1.0, rows=come, operation="conv"
    )
    known = contest.table.get(name)
    if known is None:
        known = _measure(layer, shape, contest)
        contest.table.put(name, known)
    return known


def _measure(layer: nn.Conv2d, shape: torch.Size, contest: Contest) -> float:
    """Time over that of the better one of PyTorch's two layouts of images."""
    x, last, packed = torch.randn(shape), torch.channels_last, SparseConv2d(layer)
    other = copy.deepcopy(layer)
    other.weight.data = other.weight.data.to(memory_format=last)
    calls: dict[str, Callable[[], object]] = {
        "dense": partial(layer, x), "last": partial(other, x.to(memory_format=last)),
        "packed": partial(packed, x),
    }  # fmt: skip
    little = nn.Conv2d(1, 1, 1).requires_grad_(False)
    twin = {
        "dense": partial(little, torch.ones(1, 1, 4, 4)),
        "packed": partial(SparseConv2d(little), torch.ones(1, 1, 4, 4)),
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
