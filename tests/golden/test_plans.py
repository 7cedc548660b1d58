"""Which units a plan by magnitude removes, worked out anew in float64 without the engine.

The networks are chains, whose weights are sines: the score of a unit is the L1 norm of what produces it, in units of
its layer's mean; a tenth of every layer stays; units go from the lowest score on until the target holds.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc

RULE = {"name": "magnitude", "norm": "l1", "coupled": "out"}
SIZE = 6  # of the images, whose size convolutions with padding keep
NETS = {  # kind, and widths from the input to the output
    "a pair": ("linear", (5, 12, 3)),
    "three": ("linear", (4, 16, 9, 2)),
    "narrow": ("linear", (7, 3, 3, 3, 2)),
    "wide first": ("linear", (3, 40, 6, 4)),
    "deep": ("linear", (6, 11, 13, 7, 12, 5)),
    "images": ("conv", (2, 10, 3)),
    "images, three": ("conv", (1, 8, 14, 4)),
    "images, deep": ("conv", (3, 9, 5, 12, 2)),
}
ALL = -1  # whatever may go
TARGETS = [{"sparsity": 0.3}, {"count": 5}, {"macs": 0.45}, {"count": ALL}]


def weight(at: int, shape: tuple[int, ...]) -> np.ndarray:
    places = np.arange(math.prod(shape), dtype=np.float64)
    return np.sin(places * (0.7 + 0.13 * at) + at).astype(np.float32).reshape(shape) * (at + 1)


def build(kind: str, widths: tuple[int, ...]) -> tuple[nn.Sequential, torch.Tensor, dict[str, np.ndarray]]:
    layers: list[nn.Module] = []
    weights = {}
    for at, (into, out) in enumerate(pairwise(widths)):
        layer = nn.Linear(into, out) if kind == "linear" else nn.Conv2d(into, out, 3, padding=1)
        name = str(len(layers))
        weights[name] = weight(at, tuple(layer.weight.shape))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weights[name]))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.ones(1, widths[0], *([SIZE] * 2 if kind == "conv" else [])), weights


def expected(kind: str, widths: tuple[int, ...], weights: dict[str, np.ndarray], target: dict) -> dict[str, list[int]]:
    hidden, places = list(weights)[:-1], 1 if kind == "linear" else 9 * SIZE * SIZE
    ranking = []
    for name in hidden:
        norms = np.abs(weights[name].astype(np.float64)).reshape(len(weights[name]), -1).sum(1)
        order = np.argsort(norms, kind="stable")
        floor = max(1, math.ceil(len(norms) / 10))
        ranking += [(norms[unit] / norms.mean(), name, int(unit)) for unit in order[: len(norms) - floor]]
    ranking.sort()

    def cost(gone: int) -> int:
        fewer = [sum(name == cut for _, cut, _ in ranking[:gone]) for name in hidden]
        inner = [width - less for width, less in zip(widths[1:-1], fewer, strict=True)]
        left = [widths[0], *inner, widths[-1]]
        return sum(into * out for into, out in pairwise(left)) * places

    units = sum(widths[1:-1])
    if "macs" in target:
        wanted = next(n for n in range(len(ranking) + 1) if cost(n) <= target["macs"] * cost(0))
    else:
        wanted = target.get("count") or math.floor(target["sparsity"] * units + 0.5)
    assert wanted <= len(ranking)
    found: dict[str, list[int]] = {name: [] for name in hidden}
    for _, name, unit in ranking[:wanted]:
        found[name].append(unit)
    return {name: sorted(numbers) for name, numbers in found.items()}


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_the_lowest_go_and_no_others(name: str, target: dict) -> None:
    kind, widths = NETS[name]
    if target.get("count") == ALL:
        target = {"count": sum(width - max(1, math.ceil(width / 10)) for width in widths[1:-1])}
    model, x, weights = build(kind, widths)
    granularity = "neuron" if kind == "linear" else "channel"
    plan = sc.plan(model, x, granularity=granularity, criterion=RULE, target=target)
    removed = {group: removal["removed"] for group, removal in plan.groups.items()}
    assert removed == expected(kind, widths, weights, target)
