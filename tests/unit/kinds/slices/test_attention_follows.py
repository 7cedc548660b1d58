"""Fused attention scales by the width of its heads: a factor keeps the scale, or it follows where that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc

X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.heads, self.factor = 4, factor

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q * self.factor, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("scales", ["keep", "follow"])
def test_the_scale(scales: str) -> None:
    model: Any = Attention().eval()
    asked = {"scales": scales} if scales == "follow" else {}
    plan = sc.plan(model, X, granularity="head_dim", target={"sparsity": 0.4}, criterion={"name": "random"}, **asked)
    cut: Any = plan.apply(model)
    assert plan.certificate is not None
    follows = [note for note in plan.certificate.notes if "scales by the width, which follows" in note]
    assert bool(follows) == (scales == "follow")
    width = cut.q.out_features // 4
    assert width < 8
    factor = (8 / width) ** 0.5 if scales == "follow" else 1.0  # the cut model's scale over the original's
    truth = Attention(factor).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, dims in plan.cuts.items():
        for d, kept in dims.items():
            gone = torch.ones(state[name].shape[d], dtype=torch.bool).index_fill(0, kept, False)
            state[name].index_fill_(d, gone.nonzero().flatten(), 0)
    truth.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(cut(X), truth(X), atol=1e-5)
        assert not torch.allclose(Attention.forward(model, X), truth(X), atol=1e-3)
