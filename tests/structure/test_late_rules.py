"""A rule that comes after its operator was met counts from then on, and so does its being taken away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import UnsupportedError
from secateur.structure.rules import Call, base, known, register

LIBRARY = torch.library.Library("secateur_late", "DEF")
LIBRARY.define("squash(Tensor x) -> Tensor")
LIBRARY.impl("squash", lambda x: torch.tanh(x), "CompositeExplicitAutograd")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.ops.secateur_late.squash(self.first(x)))
        return result


def cut() -> nn.Module:
    net, x = Net(), torch.randn(3, 4)
    return sc.plan(net, x, granularity="neuron", target={"sparsity": 0.5}).apply(net)


def test_a_rule_that_comes_late_counts() -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedError, match="no rule for the operator secateur_late::squash"):
        cut()
    assert not known(torch.ops.secateur_late.squash.default)

    @register("secateur_late::squash")
    def rule(call: Call) -> tuple[object, ...]:
        return call.axes(call.first)

    try:
        assert cut().first.out_features == 4
    finally:
        del base._RULES["secateur_late::squash"]
        base._find.cache_clear()
