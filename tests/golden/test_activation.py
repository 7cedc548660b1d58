"""Activation criteria on networks whose answer is known beforehand."""

import copy

import pytest
import torch
from torch import nn

from secateur.api import score
from secateur.criteria.activations.activation_variance import ActivationVariance
from secateur.criteria.activations.apoz import APoZ
from secateur.criteria.activations.lasso import Lasso
from secateur.criteria.activations.mean_activation import MeanActivation
from secateur.criteria.activations.structured_obs import StructuredOBS
from secateur.criteria.activations.thinet import ThiNet
from secateur.planning.build import make_plan
from secateur.statistics.activations.streams import Zeros


def net(channels):
    """A convolution that passes its input on, so that the data are the activations in front of the ReLU."""
    model = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.ReLU(), nn.Conv2d(channels, 2, 1))
    model[0].weight.data.copy_(torch.eye(channels)[:, :, None, None])
    return model.eval()


def images(zeros, samples=2, side=4):
    """[samples, channels, side, side] with exactly so many activations that the ReLU turns to zero."""
    x = torch.ones(len(zeros), samples * side * side)
    for channel, count in enumerate(zeros):
        x[channel, :count] = -1.0
    return x.view(len(zeros), samples, side, side).transpose(0, 1).contiguous()


def test_apoz_of_the_worked_example():
    """APoZ 11/32, 12/32, 14/32: the third channel goes."""
    model, x = net(3), images([11, 12, 14])
    found = score(model, x, criterion=APoZ(), granularity="channel", data=[x])["0"]
    assert found.tolist() == [1 - 11 / 32, 1 - 12 / 32, 1 - 14 / 32]
    plan = make_plan(model, x, target={"count": 1}, criterion=APoZ(), data=[x])
    assert plan.groups["0"]["removed"] == [2]


def test_apoz_of_unequal_batches_is_that_of_all_samples():
    """Counts, not means of means: 3 samples in one batch, 1 in the next (T8a)."""
    model, x = net(3), images([5, 40, 64], samples=4)
    found = score(model, x, criterion=APoZ(), granularity="channel", data=[x[:3], x[3:]])["0"]
    assert found.tolist() == [1 - 5 / 64, 1 - 40 / 64, 0.0]


def test_apoz_of_a_large_count_is_exact():
    """2^24 + 1 activations are more than float32 can count."""
    zeros = Zeros()
    block = torch.zeros(2**14, 2)
    for _ in range(2**10):
        zeros.add(block, 1)
    zeros.add(torch.zeros(1, 2), 1)
    assert zeros.zeros.tolist() == [2**24 + 1] * 2
    assert zeros.zeros.dtype == torch.int64


def planted():
    """A small network with a channel of zeros, a dead one, and one whose output nobody reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
    with torch.no_grad():
        model[0].bias.uniform_(0.1, 0.3)
        model[0].weight[1], model[0].bias[1] = 0.0, 0.0
        model[0].bias[4] = -100.0
    return model.eval(), torch.randn(16, 3, 6, 6)


@pytest.mark.parametrize(
    "criterion",
    [APoZ(), MeanActivation(), ActivationVariance(), Lasso(positions=None), ThiNet(positions=None),
     StructuredOBS(positions=None)],
    ids=lambda c: c.name,
)  # fmt: skip
def test_planted_dead_channels_go_first_and_cost_nothing(criterion):
    """T19: zero and dead channels."""
    model, x = planted()
    scores = score(model, x, criterion=criterion, granularity="channel", data=[x[:5], x[5:]])["0"]
    assert sorted(torch.argsort(scores)[:2].tolist()) == [1, 4]
    plan = make_plan(model, x, target={"count": 2}, criterion=criterion, data=[x])
    assert plan.groups["0"]["removed"] == [1, 4]
    with torch.no_grad():
        torch.testing.assert_close(plan.apply(model)(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("criterion", [Lasso(positions=None), ThiNet(positions=None), StructuredOBS(positions=None)],
                         ids=lambda c: c.name)  # fmt: skip
def test_a_channel_that_nobody_reads_goes_first(criterion):
    model, x = planted()
    model[2].weight.data[:, 6] = 0.0
    scores = score(model, x, criterion=criterion, granularity="channel", data=[x])["0"]
    assert sorted(torch.argsort(scores)[:3].tolist()) == [1, 4, 6]


def test_the_variance_sees_a_constant_channel_that_the_mean_does_not():
    model, x = planted()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 50.0
    options = {"granularity": "channel", "data": [x]}
    assert float(score(model, x, criterion=ActivationVariance(), **options)["0"][2]) == 0.0
    assert int(score(model, x, criterion=MeanActivation(), **options)["0"].argmax()) == 2


def test_scoring_leaves_the_model_alone():
    model, x = planted()
    before = copy.deepcopy(model.state_dict())
    for criterion in (APoZ(), Lasso(), StructuredOBS()):
        score(model, x, criterion=criterion, granularity="channel", data=[x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
