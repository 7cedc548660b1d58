"""Lines that are named are lines of the model: whoever calls secateur is not to blame for what a model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc

HERE = Path(__file__).name


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).sort(-1).values)
        return out


MADE_OF_TORCH = {
    "encoder": (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16)),
    "chain": (
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)),
        torch.randn(2, 1, 8, 8),
    ),
    "lstm": (nn.LSTM(8, 6, batch_first=True), torch.randn(2, 5, 8)),
}


@pytest.mark.parametrize("name", MADE_OF_TORCH)
def test_a_model_of_torch_alone_names_no_line_of_its_caller(name: str) -> None:
    model, x = MADE_OF_TORCH[name]
    locks = [lock for group in sc.inspect(model.eval(), x).locked for lock in group.locks]
    assert locks
    assert not [lock.where for lock in locks if HERE in lock.where + lock.reason + lock.hint]


def test_a_line_of_the_model_is_named() -> None:
    locks = [lock for group in sc.inspect(Sorted(), torch.randn(2, 8)).locked for lock in group.locks]
    assert any(HERE in lock.where for lock in locks)
