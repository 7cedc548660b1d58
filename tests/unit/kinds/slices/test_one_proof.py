"""A cut that only one of the two proofs can be run for is not made, unless that was asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CertificateError
from secateur.structure.rules import base
from secateur.structure.rules.base import Call, register
from secateur.structure.rules.norm import mixed
from secateur.structure.trace import Axes


@torch.library.custom_op("secateur_tests::strict", mutates_args=())
def strict(x: Tensor) -> Tensor:
    """Refuses NaN, as code of somebody else's may."""
    if bool(torch.isnan(x).any()):
        raise ValueError("not a number")
    return x * 2


def rule(call: Call) -> list[Axes]:
    """Mixes the last dimension: the replay gives it what is kept, and the original run eagerly has NaN there."""
    mixed(call, [-1])
    return [call.axes(call.first)]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    """Other tests go through all rules that there are."""
    register("secateur_tests::strict")(rule)
    yield
    del base._RULES["secateur_tests::strict"]


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(strict(self.a(x).relu()))


@pytest.mark.parametrize("proof", ["default", "full"])
def test_it_is_refused_with_the_line(proof: str) -> None:
    model = Net().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = sc.plan(model, X, granularity="channel", target={"sparsity": 0.3}, proof=proof)
    with pytest.raises(CertificateError, match=r"not a number.*test_one_proof") as refused:
        plan.apply(model)
    assert 'proof="example"' in str(refused.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_asked_for_it_is_made_and_said() -> None:
    model = Net().eval()
    plan = sc.plan(model, X, granularity="channel", target={"sparsity": 0.3}, proof="example")
    cut = plan.apply(model)
    assert cut.a.out_features < 16
    assert "could not be run" in plan.explain()
