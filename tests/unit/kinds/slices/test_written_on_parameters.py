"""What stands on parameters: words go along in a copy, hooks and tensors are named, and in place all of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def planned(model: nn.Module) -> Any:
    return sc.plan(model, X, granularity="channel", target={"sparsity": 0.3})


def test_words_go_along() -> None:
    model: Any = Net().eval()
    model.a.weight.group, model.b.bias.decay = {"name": ["slow"]}, False
    cut: Any = planned(model).apply(model)
    assert cut.a.weight.group == {"name": ["slow"]}
    assert cut.a.weight.group is not model.a.weight.group
    assert cut.b.bias.decay is False


@pytest.mark.parametrize("how", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_are_named(how: str) -> None:
    model: Any = Net().eval()
    getattr(model.a.weight, how)(lambda given: None)
    plan = planned(model)
    said = [c.text for c in plan.conditions if "hooks on parameters" in c.text]
    assert len(said) == 1
    assert "a.weight" in said[0]
    assert said[0] in plan.explain()
    assert not [c for c in planned(Net().eval()).conditions if "parameters are not in a copy" in c.text]


def test_tensors_are_named_and_stay_behind() -> None:
    model: Any = Net().eval()
    model.a.weight.average = torch.zeros(16, 8)
    plan = planned(model)
    assert [c for c in plan.conditions if "attributes of parameters" in c.text and "a.weight" in c.text]
    assert not hasattr(plan.apply(model).a.weight, "average")


def test_in_place_hooks_stay() -> None:
    model: Any = Net().eval()
    seen: list[torch.Size] = []
    model.a.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    planned(model).apply(model, inplace=True)
    model(X).sum().backward()
    assert seen == [model.a.weight.shape]
    assert seen[0][0] < 16
