"""Penalties: values, gradients and proximal steps against float64, and what they do to a network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pattern_problem import Net, patterns
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import InputError, RecipeError
from secateur.training import penalties
from secateur.training.penalties import GatePenalty, GroupLasso, Growing, HardConcrete, penalty

X, Y = patterns(64, 1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 4))


def array(parameter):
    return parameter.detach().double().numpy()


def weights(model):
    return [array(model[1].weight), array(model[3].weight)]


def rows(w):
    return np.sqrt((w**2).sum(1))


VALUES = {
    "l1": lambda w: sum(np.abs(v).sum() for v in w),
    "l2": lambda w: sum((v**2).sum() for v in w) / 2,
    "group_lasso": lambda w: sum(np.sqrt(v.shape[1]) * rows(v).sum() for v in w),
}
GRADIENTS = {
    "l1": np.sign,
    "l2": lambda v: v,
    "group_lasso": lambda v: np.sqrt(v.shape[1]) * v / rows(v)[:, None],
}
STEPS = {
    "l1": lambda v, r: np.sign(v) * np.maximum(np.abs(v) - r, 0),
    "l2": lambda v, r: v / (1 + r),
    "group_lasso": lambda v, r: np.maximum(1 - r * np.sqrt(v.shape[1]) / rows(v), 0)[:, None] * v,
}


@pytest.mark.parametrize("name", VALUES)
def test_values_gradients_and_steps_are_those_of_the_formula(name):
    model = plain()
    cost = penalty(name, model, strength=0.3)
    assert float(cost().detach()) == pytest.approx(0.3 * VALUES[name](weights(model)), rel=1e-5)
    cost().backward()
    for layer, before in zip((model[1], model[3]), weights(model), strict=True):
        np.testing.assert_allclose(array(layer.weight.grad), 0.3 * GRADIENTS[name](before), rtol=1e-4, atol=1e-6)
    before = weights(model)
    cost.step(0.1)
    for layer, was in zip((model[1], model[3]), before, strict=True):
        np.testing.assert_allclose(array(layer.weight), STEPS[name](was, 0.03), rtol=1e-4, atol=1e-7)
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()


@pytest.mark.parametrize("name", VALUES)
def test_held_by_an_optimizer_it_is_the_penalty_in_the_loss(name):
    ours, theirs = plain(), plain()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (ours, theirs)]
    penalty(name, ours, strength=0.01, optimizer=optimizers[0])
    inside = penalty(name, theirs, strength=0.01)
    for _ in range(4):
        F.cross_entropy(ours(X), Y).backward()
        (F.cross_entropy(theirs(X), Y) + inside()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["l1", "group_lasso"])
def test_proximal_steps_reach_exact_zeros_and_subgradients_do_not(name):
    zeros = {}
    for method in ("proximal", "subgradient"):
        torch.manual_seed(0)
        model = plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        penalty(name, model, strength=0.05, method=method, optimizer=optimizer)
        for _ in range(30):
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
        weight = model[1].weight.detach()
        zeros[method] = int((weight == 0).all(1).sum() if name == "group_lasso" else (weight == 0).sum())
    assert zeros["proximal"] > 0
    assert zeros["subgradient"] == 0


@pytest.mark.parametrize("method", ["proximal", "subgradient"])
@pytest.mark.parametrize("example", [None, X[:2]])
def test_slimming_makes_scales_small_and_their_channels_go(method, example):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # Momentum multiplies what comes as a gradient, and not what comes as a step.
    strength = {"subgradient": 0.05, "proximal": 0.5}[method]
    slimming = penalty("slimming", model, example, strength=strength, method=method, optimizer=optimizer)
    assert list(slimming.paying) == ["norm1.weight", "norm2.weight"]
    assert float(slimming().detach()) == pytest.approx(strength * 24)
    for _ in range(40):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    slimming.remove()
    scales = torch.cat([model.norm1.weight, model.norm2.weight]).detach().abs()
    assert scales.min() < 0.1 < scales.max()
    assert (scales == 0).any() == (method == "proximal")
    plan = sc.plan(model, X[:2], criterion="bn-scale", target={"sparsity": 0.3})
    gone = torch.cat([(~plan.evidence.keep[name]) for name in ("conv1", "conv2")])
    assert scales[gone].max() <= scales[~gone].min()


@pytest.mark.parametrize("coupled", ["out", "all"])
def test_group_lasso_of_channels_counts_what_belongs_to_them(coupled):
    model = Net()
    lasso = GroupLasso(model, X[:2], strength=1.0, granularity="channel", coupled=coupled)
    one, two = array(model.conv1.weight), array(model.conv2.weight)
    own = (one**2).sum((1, 2, 3)), (two**2).sum((1, 2, 3))
    sizes = (9, 72)
    if coupled == "all":
        scales = [array(n.weight) ** 2 + array(n.bias) ** 2 for n in (model.norm1, model.norm2)]
        read = (two**2).sum((0, 2, 3)), (array(model.classify.weight) ** 2).sum(0)
        own = tuple(o + s + r for o, s, r in zip(own, scales, read, strict=True))
        sizes = 9 + 2 + 16 * 9, 72 + 2 + 4
    wanted = sum(np.sqrt(size) * np.sqrt(o).sum() for size, o in zip(sizes, own, strict=True))
    assert float(lasso().detach()) == pytest.approx(wanted, rel=1e-5)
    assert float(penalty("group_lasso", nn.Linear(2, 2).requires_grad_(), strength=1.0)().detach()) > 0


def test_the_gradient_of_a_unit_that_is_zero_is_zero():
    layer = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(layer.weight)
    penalty("group_lasso", layer, strength=1.0)().backward()
    assert not layer.weight.grad.any()


def test_growing_moves_what_goes_and_leaves_what_stays():
    model = plain()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    growing = Growing(model, X[:2], sparsity=0.5, strength=0.5, every=2, ceiling=1.0, optimizer=optimizer)
    keep = growing.keep["1"]
    assert int(keep.sum()) == 6
    rates = []
    for _ in range(8):
        rates.append(growing.rate)
        (model[1].weight.sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rates == [0, 0, 0.5, 0.5, 1, 1, 1, 1]
    assert torch.equal(model[1].weight[keep], before["1.weight"][keep])
    factor = 0.75**2 * 0.5**4
    torch.testing.assert_close(model[1].weight[~keep], before["1.weight"][~keep] * factor)
    again = Growing(plain_like(before), X[:2], sparsity=0.5, strength=0.5)
    again.load_state_dict(growing.state_dict())
    assert again.steps == 8
    smaller = sc.plan(model, X[:2], keep=growing.keep).apply(model)
    assert smaller[1].out_features == 6


def plain_like(state):
    model = plain()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("method", ["proximal", "subgradient"])
def test_gates_are_inserted_trained_folded_and_cut(method):
    model = plain()
    start = model(X)
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gates = GatePenalty(model, X[:2], strength=0.15, method=method, optimizer=optimizer, lr=0.2)
    torch.testing.assert_close(model(X), start)
    assert float(gates().detach()) == pytest.approx(0.15 * 12)
    for _ in range(40):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    gated = model(X)
    scores = gates.finish()
    torch.testing.assert_close(model(X), gated)
    assert [name for name, _ in model.named_parameters()] == names
    assert scores["1"].min() < 0.5 < scores["1"].max()
    if method == "proximal":
        zero = int((scores["1"] == 0).sum())
        assert zero > 0
        smaller = sc.plan(model, X[:2], scores=scores, target={"count": zero}).apply(model)
        assert smaller[1].out_features == 12 - zero
        torch.testing.assert_close(smaller(X), gated)  # what nobody reads can go for nothing


def test_hard_concrete_gates_follow_the_paper():
    model = plain()
    start = model(X)
    hard = HardConcrete(model, X[:2], strength=1.0, drop=0.3)
    alpha = hard.paying["1"].detach().double().numpy()
    assert alpha == pytest.approx(np.log(0.7 / 0.3))
    live = 1 / (1 + np.exp(-(alpha - 2 / 3 * np.log(0.1 / 1.1))))
    assert float(hard().detach()) == pytest.approx(live.sum(), rel=1e-5)
    typical = np.clip(1 / (1 + np.exp(-alpha)) * 1.2 - 0.1, 0, 1)
    np.testing.assert_allclose(hard.scores()["1"].numpy(), typical, rtol=1e-5)
    # How often a gate that is drawn is not zero is what the penalty says.
    model.train()
    drawn = []
    for _ in range(400):
        model(X[:1])
        drawn.append(model[3].parametrizations.weight[0].z.detach().clone())
    assert float((torch.stack(drawn) > 0).double().mean()) == pytest.approx(live.mean(), abs=0.02)
    assert not torch.allclose(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))
    gated = model(X)
    hard.finish()
    torch.testing.assert_close(model(X), gated)
    assert not torch.allclose(gated, start)


def test_hard_concrete_lowers_the_number_of_units():
    model = plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    hard = HardConcrete(model, X[:2], strength=0.1, optimizer=optimizer, lr=0.2)
    before = float(hard().detach())
    for _ in range(30):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(hard().detach()) < before
    scores = hard.finish()
    assert scores["1"].min() < scores["1"].max()
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("l3", {}, RecipeError),
        ("l1", {"strenght": 1}, RecipeError),
        ("l1", {"strength": -1.0}, RecipeError),
        ("l1", {"strength": 1.0, "method": "exact"}, RecipeError),
        ("slimming", {"strength": 1.0}, InputError),
        ("group_lasso", {"strength": 1.0, "coupled": "in"}, RecipeError),
        ("hard_concrete", {"example": X[:2], "strength": 1.0, "drop": 1.0}, RecipeError),
        ("l1", {"strength": 1.0, "optimizer": torch.optim.SGD(plain().parameters(), lr=0.1)}, InputError),
    ],
)
def test_what_cannot_be_is_refused(name, options, kind):
    with pytest.raises(kind):
        penalty(name, plain(), **options)


CUT = [(name, method) for name in ("l1", "l2", "group_lasso", "slimming") for method in ("proximal", "subgradient")]
CUT_FAST = {("group_lasso", "proximal"), ("slimming", "subgradient")}


@pytest.mark.parametrize(
    ("name", "method"), [pytest.param(*one, marks=() if one in CUT_FAST else pytest.mark.slow) for one in CUT]
)
def test_a_penalty_follows_cuts(name, method):
    """What is paid after a cut is what a penalty that is made anew asks for."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    paid = penalty(name, model, X[:2], strength=0.01, method=method, optimizer=optimizer)
    pruner = sc.Pruner(
        model, X[:2], sparsity=0.5, granularity="channel", end=4, every=2, optimizer=optimizer, proof="example"
    )
    for _ in range(6):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert pruner.sparsity == 0.5
    anew = penalty(name, model, X[:2], strength=0.01)
    assert float(paid().detach()) == pytest.approx(float(anew().detach()), rel=1e-6)
    assert {n: p.shape for n, p in paid.paying.items()} == {n: p.shape for n, p in anew.paying.items()}
    twin = copy.deepcopy(model)
    penalty(name, twin, X[:2], strength=0.01).step(0.1)
    paid.step(0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_very_first_step_after_a_cut_is_paid_for():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty("l1", model, X[:2], strength=0.5, method="subgradient", optimizer=optimizer)
    sc.plan(model, X[:2], target={"count": 3}).apply(model, inplace=True, optimizer=optimizer)
    before = weights(model)
    assert before[0].shape[0] < 12
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, weights(model), strict=True):
        np.testing.assert_allclose(new, old - 0.05 * np.sign(old), atol=1e-6)


def test_a_penalty_of_chosen_units_says_that_they_were_cut():
    model = plain()
    growing = Growing(model, X[:2], sparsity=0.5, strength=0.5)
    sc.plan(model, X[:2], target={"count": 3}).apply(model, inplace=True)
    for use in (growing, lambda: growing.step(0.1)):
        with pytest.raises(InputError, match="was cut while 'growing' was paid"):
            use()


def test_every_penalty_has_a_summary():
    assert len(penalties.names()) >= 7
    assert all(penalties.base.PENALTIES.find(name).summary for name in penalties.names())
