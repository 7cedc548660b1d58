"""A cut in place while a graph of an earlier forward is still in somebody's hands, as in every training loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backward", [True, False])
def test_training_goes_on_after_a_cut_in_place(dtype, backward):
    model, x = net(dtype), torch.randn(5, 6, dtype=dtype)
    seen = []
    model[0].weight.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    held = model(x).square().mean()  # lives on, as `loss` of a loop does
    if backward:
        held.backward()
    plan = sc.plan(model, x, target={"sparsity": 0.5})
    plan.apply(model, inplace=True)
    model.zero_grad()
    model(x).square().mean().backward()
    fresh = plan.apply(net(dtype))
    fresh.load_state_dict(model.state_dict())
    fresh(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert ours.grad.shape == ours.shape
        assert torch.equal(ours.grad, theirs.grad)
    assert seen[-1] == tuple(model[0].weight.shape)  # hooks stay attached
    del held
