"""Worked numbers for scale criteria, the geometric median and folded gates."""

import pytest
import torch
from torch import nn

from secateur.amounts import select
from secateur.criteria.base import Context
from secateur.criteria.gradients.gates import GateScore
from secateur.criteria.weights.bn_scale import NormScale
from secateur.criteria.weights.geometric_median import GeometricMedian
from secateur.model.gates import insert_gates
from secateur.types import Group, Span

GAMMAS = [1.17, 0.10, 0.29, 0.82]


def rows(number):
    return torch.arange(number).view(-1, 1)


def test_gammas_keep_channels_0_and_3():
    norm = nn.BatchNorm2d(4)
    norm.weight.data = torch.tensor(GAMMAS)
    group = Group("norm", "channel", (4,), (Span("weight", torch.arange(4), "scale"),))
    scores = NormScale().score(Context(norm, [group]))
    assert select(scores, sparsity=0.5)["norm"].tolist() == [True, False, False, True]


def test_gates_of_the_same_sizes_keep_the_same_channels():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    group = Group("hidden", "neuron", (4,), (Span("0.weight", rows(4), "out"), Span("2.weight", rows(4).T, "in")))
    insert_gates(net, [group]).values["hidden"].data = torch.tensor(GAMMAS)
    scores = GateScore(by="magnitude").score(Context(net, [group]))
    assert select(scores, sparsity=0.5)["hidden"].tolist() == [True, False, False, True]


def test_geometric_median_by_hand():
    """Points (0,0), (3,4), (6,8), (0,8): sums of distances 23, 15 + ..., by Pythagoras."""
    layer = nn.Linear(2, 4, bias=False)
    layer.weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [0.0, 8.0]])
    group = Group("rows", "vector", (4,), (Span("weight", rows(4), "self"),))
    scores = GeometricMedian().score(Context(layer, [group]))["rows"]
    assert scores.tolist() == [5.0 + 10 + 8, 5.0 + 5 + 5, 10.0 + 5 + 6, 8.0 + 5 + 6]


def test_a_gate_at_zero_leaves_the_constant_of_the_norm():
    """gamma = 0, beta = 2 emits relu(2) = 2 whatever the input: the consumer's bias can carry it."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).eval()
    net = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 2, 1)).double()
    norm.weight.data[1], norm.bias.data[1] = 0.0, 2.0
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    group = Group(
        "norm",
        "channel",
        (3,),
        (Span("0.weight", torch.arange(3), "scale"), Span("2.weight", torch.arange(3).view(1, 3, 1, 1), "in")),
    )
    with torch.no_grad():
        whole = net(x)
        lost = net[2].weight[:, 1, 0, 0] * 2.0
        gates = insert_gates(net, [group])
        gates.values["norm"][1] = 0.0
        gates.fold()
        assert net[2].weight[:, 1].eq(0).all()
        net[2].bias += lost
        torch.testing.assert_close(net(x), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_gate_slope_is_the_derivative(channel):
    """z dL/dz of a gate equals the finite difference of the loss in z."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    group = Group("hidden", "neuron", (3,), (Span("2.weight", rows(3).T, "in"),))
    x, y = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    slope = GateScore(by="gradient").score(Context(net, [group], data=[(x, y)]))["hidden"][channel]
    gates, losses = insert_gates(net, [group]), []
    for z in (1 + 1e-5, 1 - 1e-5):
        gates.values["hidden"].data.fill_(1.0)[channel] = z
        losses.append(nn.functional.mse_loss(net(x), y).item())
    assert float(slope) == pytest.approx(abs(losses[0] - losses[1]) / 2e-5, rel=1e-5)
