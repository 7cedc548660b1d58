"""A scale that a width sets is kept where outputs do not show it: behind gates, signs, rounding, sleeping branches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.o((a @ v).transpose(1, 2).flatten(2))


class Hidden(nn.Module):
    def __init__(self, hide: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.hide = Attention(), hide

    def forward(self, x: Tensor) -> Tensor:
        return self.hide(x, 3 * self.inner(x))


HIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "not at all": lambda x, y: x + y,
    "gate": lambda x, y: x + 0 * y,
    "small gate": lambda x, y: x + 1e-12 * y,
    "sign": lambda x, y: y > 0,
    "half": lambda x, y: (x + 1e3 * y).to(torch.bfloat16),
    "large": lambda x, y: torch.where(x > 50, y, x),
}


@pytest.mark.parametrize("name", HIDE)
def test_the_factor_is_found_behind(name: str) -> None:
    torch.manual_seed(0)
    model, x = Hidden(HIDE[name]).eval(), torch.randn(2, 6, 8)
    plan = sc.plan(model, x, remove={"inner.q/head_dim": [0, 3]}, granularity="head_dim")
    assert {scale.factor for scale in plan.scales} == {(4 / 6) ** 0.5}
