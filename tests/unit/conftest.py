"""Trained networks and data that the tests of these folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pattern_problem import Net, patterns
from torch import nn

from secateur.recover import finetune
from secateur.sources import TensorData


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
