"""An encoder of torch that packs padded batches is not left with a number of heads that it fails on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import UnsupportedError

from .usages import data, equal, seeded


class Padded(nn.Module):
    """Hides the last step where it is asked to."""

    def __init__(self, heads: int, always: bool) -> None:
        super().__init__()
        self.stem, self.out, self.always = nn.Linear(8, 16), nn.Linear(16, 3), always
        layer = nn.TransformerEncoderLayer(16, heads, 24, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, hide: bool = False) -> Tensor:
        padding = None
        if hide or self.always:
            padding = (torch.arange(x.shape[1]) >= x.shape[1] - 1).expand(len(x), -1)
        return self.out(self.encoder(self.stem(x), src_key_padding_mask=padding)[:, 0])


def planned(model: nn.Module, sparsity: float) -> sc.Plan:
    return sc.plan(model, data(2, 6, 8), granularity="head", target={"sparsity": sparsity}, criterion="random")


@pytest.mark.parametrize("heads", [2, 4])
def test_an_odd_number_of_heads_is_refused_where_it_fails(heads: int) -> None:
    model = seeded(lambda: Padded(heads, always=True))
    plan = planned(model, 0.25 if heads == 4 else 0.5)
    with pytest.raises(UnsupportedError, match="odd number of heads"):
        plan.apply(model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_odd_number_of_heads_is_said_where_it_may_fail() -> None:
    model = seeded(lambda: Padded(2, always=False))
    plan = planned(model, 0.5)
    small = plan.apply(model)
    assert "holds without src_key_padding_mask" in plan.explain()
    with torch.no_grad(), pytest.raises(AssertionError, match="not even"):
        small(data(2, 6, 8), hide=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_even_number_of_heads_runs_padded() -> None:
    model = seeded(lambda: Padded(4, always=True))
    plan = planned(model, 0.5)
    small = plan.apply(model)
    assert small.encoder.layers[0].self_attn.num_heads == 2
    assert "src_key_padding_mask" not in plan.explain()
    with torch.no_grad():
        fused = small(data(3, 9, 8))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            equal(small(data(3, 9, 8)), fused)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
