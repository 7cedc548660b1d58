"""What a replay holds at its small size is, once somebody reads all of it, what it would have held at its full size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.kinds.slices import replay
from secateur.kinds.slices.narrow import Narrow
from secateur.kinds.slices.replay import Replay
from secateur.model.tensors import named_tensors
from secateur.structure.capture import capture
from secateur.structure.groups import structure

BETWEEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "relu": lambda m, h: h.relu(),
    "in place": lambda m, h: h.relu_(),
    "in place, and read twice": lambda m, h: h + h.relu_(),
    "gelu": lambda m, h: F.gelu(h),
    "silu": lambda m, h: F.silu(h),
    "sigmoid": lambda m, h: h.sigmoid(),
    "tanh": lambda m, h: h.tanh(),
    "a number": lambda m, h: h * 3 - 1,
    "with itself": lambda m, h: h * h.sigmoid() + h,
    "a norm": lambda m, h: m.norm(h),
    "a norm and more": lambda m, h: m.norm(h).relu() + h,
    "a weight": lambda m, h: h * m.scale,
    "softmax": lambda m, h: h.softmax(1),
    "a mean": lambda m, h: h - h.mean(1, keepdim=True),
    "a view in between": lambda m, h: h.view(4, 1, -1).relu().flatten(1),
    "written to through a view": lambda m, h: (h.view(-1).mul_(2), h.relu())[1],
    "another width": lambda m, h: h + m.column(h.sum(1, keepdim=True)),
    "a comparison": lambda m, h: torch.where(h > 0, h, 0 * h),
}


class Between(nn.Module):
    """Two products, and something between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.norm = nn.Linear(5, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)
        self.norm.running_mean.uniform_(-1, 1)
        self.scale, self.column = nn.Parameter(torch.randn(8)), nn.Linear(1, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


@pytest.mark.parametrize("name", BETWEEN)
def test_it_makes_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Between(BETWEEN[name]).eval(), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    trace = capture(model, x)
    found = structure(model, trace)
    free = [group for group in found.groups if not group.locks]
    assert free
    keep = {found.atoms[group.name].id: np.arange(group.size) % 3 != 1 for group in free}
    small = Replay(trace, named_tensors(model), keep).run()
    monkeypatch.setattr(replay, "run_narrow", lambda *told: None)
    monkeypatch.setattr(Narrow, "is_small", property(lambda self: False))
    for a, b in zip(small, Replay(trace, named_tensors(model), keep).run(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_stays_small_until_it_is_read() -> None:
    stay = torch.tensor([1, 3])
    narrow = Narrow(torch.ones(2, 2), -1, 4, stay)
    assert narrow.at(1, stay.clone()) is narrow.small
    assert torch.isnan(narrow.at(1, torch.tensor([0, 1]))[:, 0]).all()  # what is removed is there, and is no number
    assert not narrow.is_small
    narrow.full()[:, 1] = 5  # written to: from now on the whole tensor is what there is
    assert narrow.at(1, stay)[0].tolist() == [5, 1]
