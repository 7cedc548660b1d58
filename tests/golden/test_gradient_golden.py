"""Worked numbers for the gradient criteria: quadratics, group variants, SynFlow, GraSP."""

import pytest
import torch
from torch import nn

from secateur.criteria.base import Context
from secateur.criteria.gradients.grasp import Grasp
from secateur.criteria.gradients.integrated import IntegratedGradients
from secateur.criteria.gradients.loss_gradient import StationaryWarning
from secateur.criteria.gradients.movement import Movement
from secateur.criteria.gradients.synflow import SynFlow
from secateur.criteria.gradients.taylor import Taylor
from secateur.types import Group, Span

H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=torch.float64)
C = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
AWAY = (0.8, -1.5, 0.9)


class Point(nn.Module):
    """A model that is nothing but its three weights."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def quadratic(model, batch):
    step = model.w - C
    return 0.5 * step @ H @ step + 0 * batch.sum()


def at(values, *, granularity="element", loss=quadratic):
    spans = (Span("w", None if granularity == "element" else torch.zeros(3).long(), "self"),)
    shape = (3,) if granularity == "element" else (1,)
    data = [torch.zeros(1, 1, dtype=torch.float64)]
    return Context(Point(values), [Group("w", granularity, shape, spans)], data=data, loss=loss)


def assert_equal(scores, expected, tolerance=1e-6):
    torch.testing.assert_close(scores, torch.tensor(expected), atol=tolerance, rtol=tolerance)


def test_first_order_term_of_the_quadratic():
    """-g w = (.24, 2.25, -.945); the reductions take its size."""
    assert_equal(Taylor(reduce="abs").score(at(AWAY))["w"], [0.24, 2.25, 0.945])
    assert_equal(Taylor(reduce="squared").score(at(AWAY))["w"], [0.24**2, 2.25**2, 0.945**2])
    assert_equal(Taylor(reduce="signed").score(at(AWAY, granularity="vector"))["w"], [0.24 + 2.25 - 0.945])


@pytest.mark.parametrize(
    ("reduce", "expected"), [("signed", 0.1), ("abs", 1.1), ("squared", 0.51), ("mean", 1.1 / 3), ("per-batch", 0.01)]
)
def test_group_variants(reduce, expected):
    """g w = (.5, -.5, .1)."""
    context = at((1.0, 1.0, 1.0), granularity="vector", loss=lambda m, x: m.w @ m.w.new_tensor([0.5, -0.5, 0.1]))
    assert Taylor(reduce=reduce).score(context)["w"].item() == pytest.approx(expected, rel=1e-6)


def test_grasp_keeps_the_flow():
    """S = -w * H g = (-.24, 7.0875, -2.565); the authors remove the largest S, the score kept is -S."""
    assert_equal(Grasp().score(at(AWAY))["w"], [0.24, -7.0875, 2.565])
    assert_equal(Grasp(keep="largest").score(at(AWAY))["w"], [0.24, 7.0875, 2.565])


def test_grasp_predicts_the_norm_of_the_gradient():
    """Deleting q changes ||g||^2 by 2 S_q + ||H e_q||^2 w_q^2, exactly."""
    w = torch.tensor(AWAY, dtype=torch.float64)
    flow = -Grasp().score(at(AWAY))["w"].double()
    before = (H @ (w - C)).square().sum()
    for q, expected in enumerate((10.4, 37.2375, -1.6875)):
        shorter = w.clone()
        shorter[q] = 0
        true = (H @ (shorter - C)).square().sum() - before
        assert float(true) == pytest.approx(expected, abs=1e-10)
        assert float(2 * flow[q] + H[:, q].square().sum() * w[q] ** 2) == pytest.approx(expected, abs=1e-5)


def test_decayed_optimum_turns_taylor_into_magnitude():
    """At the optimum of L + lambda/2 w^2: -g w = lambda w^2, and the criterion says so."""
    w = torch.linalg.solve(H + 0.3 * torch.eye(3, dtype=torch.float64), H @ C)
    with pytest.warns(StationaryWarning, match="rank as magnitude"):
        scores = Taylor(reduce="abs").score(at(tuple(w.tolist())))["w"]
    assert_equal(scores, [0.229701, 0.932038, 0.044047])
    assert_equal(scores, (0.3 * w**2).float().tolist())


def test_no_warning_away_from_the_optimum():
    Taylor(reduce="abs").score(at(AWAY))  # warnings are errors


@pytest.mark.parametrize("steps", [1, 3])
def test_integral_is_the_true_change_of_a_quadratic(steps):
    """(1.52, 5.625, -.135) = -g w + h w^2 / 2 = L without the weight - L."""
    assert_equal(IntegratedGradients(path="unit", steps=steps).score(at(AWAY))["w"], [1.52, 5.625, -0.135])
    w = torch.tensor(AWAY, dtype=torch.float64)
    joint = IntegratedGradients(path="joint", steps=steps).score(at(AWAY))["w"].double()
    change = 0.5 * C @ H @ C - 0.5 * (w - C) @ H @ (w - C)
    assert float(joint.sum()) == pytest.approx(float(change), abs=1e-5)


def test_integral_at_the_minimum_is_obd():
    assert_equal(IntegratedGradients(path="unit").score(at((1.0, -2.0, 0.5)))["w"], [2.0, 6.0, 0.25])


def test_movement_follows_the_recursion():
    """Two steps of w <- w - lr g on the quadratic, by hand."""
    w, total = torch.tensor(AWAY, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        g = H @ (w - C)
        total -= g * w
        w = w - 0.05 * g
    assert_equal(Movement(steps=5, lr=0.05).score(at(AWAY))["w"], total.float().tolist())


def synflow_net(first=1.0, second=1.0):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    net[0].weight.data = first * torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    net[2].weight.data = second * torch.tensor([[2.0, -1.0]])
    groups = [Group(n, "element", s, (Span(n, None, "self"),)) for n, s in (("0.weight", (2, 2)), ("2.weight", (1, 2)))]
    return Context(net, groups, example=torch.zeros(1, 2))


def test_synflow_of_two_layers():
    scores = SynFlow().score(synflow_net())
    assert scores["0.weight"].tolist() == [[2.0, 4.0], [0.5, 3.0]]
    assert scores["2.weight"].tolist() == [[6.0, 3.5]]
    assert float(scores["0.weight"].sum()) == float(scores["2.weight"].sum()) == 9.5
    assert scores["0.weight"].sum(1).tolist() == [6.0, 3.5]  # what flows into a neuron flows out


def test_synflow_scores_are_the_drops_of_the_flow():
    first, second = torch.tensor([[1.0, 2.0], [0.5, 3.0]]), torch.tensor([[2.0, 1.0]])
    scores = SynFlow().score(synflow_net())["0.weight"]
    for i in range(2):
        for j in range(2):
            cut = first.clone()
            cut[i, j] = 0
            assert float(scores[i, j]) == pytest.approx(9.5 - float((second @ cut).sum()))


def test_synflow_scales_as_a_whole():
    scores, scaled = SynFlow().score(synflow_net()), SynFlow().score(synflow_net(10.0, 0.3))
    for name, score in scores.items():
        torch.testing.assert_close(scaled[name], 3 * score)
