"""A problem that is learnt in a second: patterns of 36 pixels under noise, and a network for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES, SIDE = 4, 6


class Net(nn.Module):
    """Two convolutions with batch norm, and a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.classify = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.classify(x.amax((2, 3)))


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    templates = torch.randn(CLASSES, 1, SIDE, SIDE, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return templates[labels] + 0.7 * torch.randn(count, 1, SIDE, SIDE, generator=generator), labels
