"""Inputs and parts that several families share."""

from __future__ import annotations

import itertools

from torch import nn

from .cases import floats, ids

IMAGES = floats((2, 3, 12, 12), (1, 3, 12, 12), (3, 3, 16, 12))
STEPS = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))
ROWS = floats((5, 8), (1, 8), (9, 8))
TOKENS = ids(20, (2, 6), (1, 1), (3, 17))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
