"""A scale by a width beside a sum over as many: a mean that is written by hand elsewhere excuses no scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cases import Family, floats
from .references import over

family = Family("scales")
ROWS = floats((5, 8), (1, 8), (9, 8))


class Kernel(nn.Module):
    """Distances to learned centres, at a temperature by the width: no layer in front could take the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 4)
        self.centres = nn.Parameter(torch.randn(7, 24) / 2)

    def kernel(self, h: Tensor) -> Tensor:
        return torch.softmax(-torch.cdist(h, self.centres) / h.shape[-1] ** 0.5, 1) @ self.centres

    def gain(self, h: Tensor) -> Tensor:
        return 1 + h.sum(1, keepdim=True) / h.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        return self.fc2(self.kernel(h) * self.gain(h))


family.case(ROWS)(Kernel)


@family.case(ROWS)
class KernelAndMean(Kernel):
    """The sum is one call of torch."""

    def gain(self, h: Tensor) -> Tensor:
        return 1 + h.mean(1, keepdim=True)


@family.case(ROWS)
class KernelAndNormByHand(Kernel):
    """The sum belongs to a norm."""

    def gain(self, h: Tensor) -> Tensor:
        return (h.square().sum(-1, keepdim=True) / h.shape[-1] + 1e-3).rsqrt()


@family.case(ROWS)
class KernelAndOtherLayer(Kernel):
    """The sum runs over another layer, which happens to be as wide and to lose as many."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.kernel(self.fc1(x).relu())) * self.gain(self.side(x).relu())


@family.case(ROWS)
class KernelOfAWidthAttribute(Kernel):
    """The width stands in an attribute that follows."""

    def kernel(self, h: Tensor) -> Tensor:
        return torch.softmax(-torch.cdist(h, self.centres) / self.fc1.out_features**0.5, 1) @ self.centres


@family.case(ROWS)
class RandomFeatures(Kernel):
    """Positive random features: two scales by the width, one of which belongs to a sum of squares elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("points", torch.randn(10, 24))
        self.values = nn.Parameter(torch.randn(10, 24) / 2)

    def sized(self, h: Tensor) -> Tensor:
        return h.square().sum(1, keepdim=True) / 2 / h.shape[1] ** 0.5

    def projected(self, h: Tensor) -> Tensor:
        return h * h.shape[1] ** -0.25 @ self.points.T

    def kernel(self, h: Tensor) -> Tensor:
        return (self.projected(h) - self.sized(h)).exp() @ self.values


def by_hand(**options: Any) -> Any:
    return family.case(ROWS, right="channel", **options)


class ByHand(nn.Module):
    """Two layers with something by hand between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mid(self.fc1(x).relu()))

    def mid(self, h: Tensor) -> Tensor:
        raise NotImplementedError


@by_hand(truths=[over("mid", "fc1.weight")])
class SumInAHelper(ByHand):
    """A mean by hand whose sum stands in a method, and whose division beside the call of it."""

    def total(self, h: Tensor) -> Tensor:
        return h.square().sum(-1, keepdim=True)

    def mid(self, h: Tensor) -> Tensor:
        return h * (self.total(h) / h.shape[-1] + 1e-3).rsqrt()


@by_hand(truths=[over("mid", "fc1.weight")])
class SumAndDivisionApart(ByHand):
    """The width has a name."""

    def mid(self, h: Tensor) -> Tensor:
        width = h.shape[-1]
        mean = h.sum(-1, keepdim=True)
        mean = mean / width
        return (h - mean) / ((h - mean).square().sum(-1, keepdim=True) / (width - 1) + 1e-3).sqrt()
