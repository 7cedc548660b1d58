"""Layers whose weight a hook of the user's makes in every run have none before the first, and are cut as well."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import secateur as sc


def made_by_a_hook(layer: nn.Module) -> nn.Module:
    """As generators with equalised learning rates have it: the weight is what it was, times a number."""
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.weight_orig * 0.7))
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv1d(12, 12, 1),
    "transposed": lambda: nn.ConvTranspose1d(12, 12, 1),
    "batch norm": lambda: nn.BatchNorm1d(12),
    "parametric relu": lambda: nn.PReLU(12),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_cut_before_the_first_run(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 12, 1), made_by_a_hook(LAYERS[name]()), nn.Conv1d(12, 4, 1)).eval()
    x = torch.randn(2, 3, 5)
    plan = sc.plan(net, x, granularity="channel", target={"sparsity": 0.5}, criterion={"name": "random"})
    cut = plan.apply(net)
    assert cut[1].weight_orig.shape[0] < 12
    assert not hasattr(net[1], "weight")
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for key, dims in plan.cuts.items():
            for d, kept in dims.items():
                gone = torch.ones(masked.state_dict()[key].shape[d], dtype=torch.bool).index_fill(0, kept, False)
                masked.state_dict()[key].index_fill_(d, gone.nonzero().flatten(), 0)
        assert torch.allclose(cut(x), masked(x), atol=1e-5)
