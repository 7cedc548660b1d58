"""Reconstruction: the closed forms of orthogonal and duplicate channels, from the model to the refitted cut."""

import pytest
import torch
from torch import nn

from secateur.api import score
from secateur.criteria.activations.lasso import Lasso
from secateur.criteria.activations.structured_obs import StructuredOBS
from secateur.criteria.activations.thinet import ThiNet
from secateur.planning.build import grouped, make_plan
from secateur.solve.refit import refit_consumers
from secateur.statistics.activations.gram import unit_gram
from secateur.statistics.activations.lasso_path import drop_points, lasso_path
from secateur.statistics.activations.readings import readings

ALL = [Lasso(positions=None), Lasso(positions=None, stages=1), ThiNet(positions=None), StructuredOBS(positions=None)]


def passing(width, outputs=1):
    """A layer that passes its input on, and a consumer that sums it."""
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, outputs, bias=False)).double()
    model[0].weight.data.copy_(torch.eye(width))
    model[1].weight.data.fill_(1.0)
    return model.eval()


def moments(model, x, name="0"):
    groups, record = grouped(model, x, "channel")
    group = next(g for g in groups if g.name == name)
    [(_, found)] = readings(model, [x], [group], positions=None, trace=record)
    pairs = [unit_gram(reading, group.size) for reading in found]
    return sum(k for k, _ in pairs) * len(x), sum(b for _, b in pairs) * len(x)


def test_orthogonal_channels():
    """T7: Z_c orthogonal with norms a_c give beta_c = max(1 - lambda / a_c^2, 0); they drop at a_c^2."""
    a = torch.tensor([3.0, 1.0, 2.0, 5.0]).double()
    x = torch.diag(a)
    model = passing(4)
    gram, output = moments(model, x)
    torch.testing.assert_close(gram, torch.diag(a.square()))
    torch.testing.assert_close(drop_points(gram, output), a.square())
    for lam, beta in lasso_path(gram, output):
        torch.testing.assert_close(beta, (1 - lam / a.square()).clamp(min=0), rtol=1e-9, atol=1e-9)
    # The lower end of the stretch on which two coefficients survive.
    lam, beta = next((lam, beta) for lam, beta in lasso_path(gram, output) if int((beta != 0).sum()) == 2)
    assert lam == pytest.approx(4.0)
    torch.testing.assert_close(
        beta, torch.tensor([1 - 4 / 9, 0, 0, 1 - 4 / 25], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    for criterion in ALL:
        found = score(model, x, criterion=criterion, granularity="channel", data=[x])["0"]
        assert torch.argsort(found).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: c.name)
def test_a_duplicate_channel(criterion):
    """T8: X_2 = 2 X_1 with the same weights: the second alone is exact, with the factor 1.5."""
    torch.manual_seed(0)
    x = torch.randn(50, 1).double() @ torch.tensor([[1.0, 2.0]]).double()
    model = passing(2, outputs=3)
    plan = make_plan(model, x[:2], target={"count": 1}, criterion=criterion, data=[x])
    assert plan.groups["0"]["removed"] == [0]
    cut = plan.apply(model)
    refit_consumers(model, cut, [x], cuts=plan.cuts, ridge=0.0)
    torch.testing.assert_close(cut[1].weight.detach(), torch.full((3, 1), 1.5).double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut(x), model(x), rtol=1e-12, atol=1e-12)


class Planted(nn.Module):
    """Convolution, ReLU, strided convolution; channel 3 is three times channel 0."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3, stride=2, padding=1)
        with torch.no_grad():
            self.first.bias.uniform_(0.1, 0.2)
            self.first.weight[3], self.first.bias[3] = 3 * self.first.weight[0], 3 * self.first.bias[0]

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("criterion", [StructuredOBS(positions=None)], ids=lambda c: c.name)
def test_one_of_two_dependent_channels_costs_nothing(criterion):
    """T19: large and redundant; norms would keep both."""
    torch.manual_seed(0)
    model, x = Planted().double().eval(), torch.randn(40, 2, 8, 8).double()
    plan = make_plan(model, x[:2], target={"count": 1}, criterion=criterion, data=[x])
    assert plan.groups["first"]["removed"] in ([0], [3])
    cut = plan.apply(model)
    with torch.no_grad():
        before = float((cut(x) - model(x)).norm() / model(x).norm())
        refit_consumers(model, cut, [x], cuts=plan.cuts, ridge=0.0, positions=None)
        after = float((cut(x) - model(x)).norm() / model(x).norm())
    assert before > 1e-2
    assert after < 1e-6
