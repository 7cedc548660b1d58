"""A problem that is learnt in a second: ten-pixel patterns under noise, and two networks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from secateur.recover import finetune
from secateur.sources import TensorData

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


@pytest.fixture(scope="session")
def train() -> TensorData:
    return TensorData(*patterns(256, 1), batch_size=32, shuffle=True)


@pytest.fixture(scope="session")
def test() -> TensorData:
    return TensorData(*patterns(400, 2), batch_size=200)


@pytest.fixture(scope="session")
def models(train: TensorData) -> list[nn.Module]:
    trained = []
    for seed in range(3):
        torch.manual_seed(seed)
        trained.append(Net())
        finetune(trained[-1], train, optimizer={"name": "adam", "lr": 0.01}, epochs=5, seed=seed)
    return trained


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
