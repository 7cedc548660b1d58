"""Units that are named by hand: where their numbers are not those of the rows, the plan says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc


class Part(nn.Module):
    """Reads the first rows by a number in the code, which keeps them."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.a, self.b, self.first = nn.Linear(4, 8), nn.Linear(8, 2), first

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h * 2 if self.first == 0 else h + h[:, :2].sum(1, keepdim=True))


@pytest.mark.parametrize(("first", "removed"), [(0, [1, 3]), (2, [3, 5])])
@pytest.mark.parametrize("by", ["remove", "keep"])
def test_numbers_of_units(first: int, removed: list[int], by: str) -> None:
    model, units = Part(first).eval(), 8 - first
    mask = torch.ones(units, dtype=torch.bool).index_fill(0, torch.tensor([1, 3]), False)
    given = {"remove": {"a": [1, 3]}} if by == "remove" else {"keep": {"a": mask}}
    plan = sc.plan(model, torch.randn(3, 4), granularity="channel", **given)
    kept = plan.cuts["a.weight"][0].tolist()
    assert sorted(set(range(8)) - set(kept)) == removed
    said = [c.text for c in plan.conditions if "named by their numbers" in c.text]
    assert [f"position {first}" in text for text in said] == [True] * bool(first)
