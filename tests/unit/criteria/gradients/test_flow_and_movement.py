"""SynFlow, movement and the integral beyond their golden values."""

import pytest
import torch
from gradient_nets import Attention, Conv, attention_groups, conv_groups, elements, images, set_statistics, tokens
from torch import nn
from torch.nn import functional

import secateur as sc
from secateur.amounts import select
from secateur.criteria import get
from secateur.criteria.base import Context
from secateur.criteria.gradients.integrated import IntegratedGradients
from secateur.criteria.gradients.movement import Movement, MovementAccumulator
from secateur.criteria.gradients.synflow import SynFlow
from secateur.criteria.gradients.taylor import Taylor
from secateur.errors import InputError, NonFiniteError, RecipeError, UnsupportedError
from secateur.model.call import default_loss

WEIGHTS = ("conv1.weight", "bn1.weight", "depth.weight", "conv2.weight", "fc.weight")


class Residual(nn.Module):
    def __init__(self, act=nn.ReLU, width=5):
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.norm, self.act = nn.LayerNorm(width), act()

    def forward(self, x):
        x = self.act(self.first(x))
        return self.last(x + functional.dropout(self.act(self.branch(self.norm(x))), 0.5, self.training))


def test_the_flow_is_conserved():
    """All layers of a chain pass the same flow, and so do the two sides of a channel."""
    torch.manual_seed(0)
    model = set_statistics(Conv())
    scores = SynFlow().score(Context(model, elements(model, *WEIGHTS), data=images()))
    total = float(scores["fc.weight"].sum())
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(scores["conv1.weight"].sum((1, 2, 3)), scores["conv2.weight"].sum((0, 2, 3)))
    torch.testing.assert_close(scores["conv1.weight"].sum((1, 2, 3)), scores["bn1.weight"])


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardtanh, nn.ELU])
def test_scores_are_the_drops_of_the_flow_also_across_branches(act):
    """R is linear in every single weight: without it, R falls by exactly its score."""
    torch.manual_seed(0)
    model = Residual(act).double()
    a, b, c = (layer.weight.detach().abs() for layer in (model.first, model.branch, model.last))

    def flow(branch):
        x = a @ torch.ones(3, dtype=torch.float64)
        return float((c @ (x + branch @ x)).sum())

    scores = SynFlow().score(Context(model, elements(model, "branch.weight"), example=torch.zeros(1, 3)))
    for i, j in ((0, 0), (2, 1), (4, 4)):
        cut = b.clone()
        cut[i, j] = 0
        assert float(scores["branch.weight"][i, j]) == pytest.approx(flow(b) - flow(cut), rel=1e-5)


def test_running_statistics_divide():
    torch.manual_seed(0)
    model = set_statistics(Conv())
    group = elements(model, "bn1.weight")
    initial = SynFlow().score(Context(model, group, data=images()))["bn1.weight"]
    running = SynFlow(norm="running").score(Context(model, group, data=images()))["bn1.weight"]
    torch.testing.assert_close(running, initial / (model.bn1.running_var + model.bn1.eps).sqrt())


def test_rounds_reach_the_sparsity_and_lose_no_layer():
    torch.manual_seed(0)
    model = set_statistics(Conv(width=8, wide=8))
    names = [n for n in WEIGHTS if n != "bn1.weight"]
    context = Context(model, elements(model, *names), data=images())
    scores = SynFlow(rounds=50, sparsity=0.97).score(context)
    flat = torch.cat([s.flatten() for s in scores.values()])
    assert sorted(flat.tolist()) == list(range(len(flat)))  # an order without ties
    keep = select(scores, sparsity=0.97)
    assert all(bool(mask.any()) for mask in keep.values())
    once = select(SynFlow().score(context), sparsity=0.97)
    assert sum(int((once[n] != keep[n]).sum()) for n in names) > 0  # scoring again matters


def test_rounds_prune_whole_channels_with_all_that_goes_with_them():
    torch.manual_seed(0)
    model = set_statistics(Conv())
    scores = SynFlow(rounds=3, sparsity=0.5).score(Context(model, conv_groups(), data=images()))
    assert sorted(torch.cat(list(scores.values())).tolist()) == list(range(14))


@pytest.mark.parametrize("factor", [1e60, 1e-60])
def test_chains_outside_the_range_of_float64_are_normalised(factor):
    torch.manual_seed(0)
    chain = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(7)]).double()
    group = elements(chain, "0.weight", "4.weight")
    plain = SynFlow().score(Context(chain, group, example=torch.ones(1, 6)))
    with torch.no_grad():
        for weight in chain.parameters():
            weight.mul_(factor)
    scaled = SynFlow().score(Context(chain, group, example=torch.ones(1, 6)))
    ratio = scaled["0.weight"].sum() / plain["0.weight"].sum()
    for name, score in plain.items():
        torch.testing.assert_close(scaled[name], score * ratio, rtol=1e-4, atol=0)


def test_branches_outside_the_range_are_refused():
    model = Residual().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e120)
    with pytest.raises(NonFiniteError, match="range of float64"):
        SynFlow().score(Context(model, elements(model, "branch.weight"), example=torch.ones(1, 3)))


def test_networks_without_a_flow_are_refused():
    with pytest.raises(UnsupportedError, match="not linear"):
        SynFlow().score(Context(Attention(), attention_groups(), data=tokens()))
    tokens_in = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(UnsupportedError, match="no input of ones"):
        SynFlow().score(Context(tokens_in, elements(tokens_in, "1.weight"), example=torch.tensor([[1, 2]])))
    dead = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(dead[0].weight)
    with pytest.raises(InputError, match="no path"):
        SynFlow().score(Context(dead, elements(dead, "1.weight"), example=torch.ones(1, 2)))
    with pytest.raises(RecipeError, match="shape of the input"):
        SynFlow().score(Context(Conv(), conv_groups()))
    for options in ({"rounds": 0}, {"rounds": 5}, {"sparsity": 1.0}, {"norm": "none"}):
        with pytest.raises(RecipeError):
            SynFlow(**options)


def test_an_accumulator_adds_up_what_the_loop_does():
    torch.manual_seed(0)
    model, data = Conv(norm=False), images()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    movement, total = MovementAccumulator(model), torch.zeros_like(model.conv2.weight)
    for x, y in data:
        optimizer.zero_grad()
        default_loss(model, (x, y)).backward()
        total -= model.conv2.weight.detach() * model.conv2.weight.grad
        movement.observe()
        optimizer.step()
    scores = Movement(accumulator=movement).score(Context(model, elements(model, "conv2.weight")))
    torch.testing.assert_close(scores["conv2.weight"], total)
    channels = Movement(accumulator=movement, coupled="in").score(Context(model, conv_groups(norm=False)[:1]))
    torch.testing.assert_close(channels["conv1"], total.sum((0, 2, 3)), rtol=1e-4, atol=1e-7)
    resumed = MovementAccumulator(model)
    resumed.load_state_dict(movement.state_dict())
    assert resumed.steps == 3
    assert torch.equal(resumed.sums["conv2.weight"], movement.sums["conv2.weight"])


def test_a_weight_that_leaves_zero_gains():
    """Planted truth: target 2 x0; w0 moves from 1 to 2, w1 from 1 to 0."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.randn(64, 2)
    context = Context(layer, elements(layer, "weight"), data=[(x, 2 * x[:, :1])])
    scores = Movement(steps=60, lr=0.1).score(context)["weight"][0]
    assert scores[0] > 0 > scores[1]
    assert torch.equal(layer.weight, torch.ones(1, 2))


def test_a_tiny_learning_rate_gives_the_signed_slope():
    torch.manual_seed(0)
    model, data = set_statistics(Conv()), images(samples=12, batch=4)
    context = Context(model, conv_groups(), data=data)
    moved = Movement(lr=1e-12).score(context)
    slope = Taylor(reduce="signed", coupled="all").score(context)
    for name, score in slope.items():
        torch.testing.assert_close(moved[name].abs() / 3, score, rtol=1e-3, atol=1e-7)


def test_bad_steps_are_refused():
    layer = nn.Linear(1, 1)
    movement = MovementAccumulator(layer)
    with pytest.raises(RecipeError, match="seen no step"):
        Movement(accumulator=movement)
    with pytest.raises(RecipeError, match="no parameter 'bia'"):
        MovementAccumulator(layer, ["bia"])
    movement.observe({"weight": torch.ones(1, 1)})
    with pytest.raises(NonFiniteError, match=r"'bias'.*index \(0,\)"):
        movement.observe({"weight": torch.ones(1, 1), "bias": torch.tensor([float("nan")])})
    assert movement.steps == 1
    with pytest.raises(InputError, match="'bias'"):  # never observed
        Movement(accumulator=movement).score(Context(layer, elements(layer, "bias")))
    with pytest.raises(RecipeError, match="needs data"):
        Movement().score(Context(layer, elements(layer, "bias")))
    with pytest.raises(NonFiniteError):
        Movement(steps=300, lr=1e3).score(
            Context(layer, elements(layer, "weight"), data=[(torch.ones(2, 1), torch.zeros(2, 1))])
        )


@pytest.mark.parametrize("path", ["unit", "group", "joint"])
def test_the_integral_adds_up_to_the_change_of_the_loss(path):
    """Completeness, and for single units the oracle: the loss without the unit, minus the loss."""
    torch.manual_seed(0)
    model, data = Attention().double().eval(), tokens(dtype=torch.float64)
    groups = attention_groups()
    scores = IntegratedGradients(path=path, steps=12, coupled="in").score(Context(model, groups, data=data))

    def loss_without(*tensors, unit=None):
        kept = {name: model.get_parameter(name).detach().clone() for name in ("out.weight", "down.weight")}
        with torch.no_grad():
            for tensor, index in tensors:
                weight = model.get_parameter(tensor)
                gone = torch.ones_like(index, dtype=torch.bool) if unit is None else index == unit
                weight.masked_fill_(gone, 0.0)
            value = sum(len(y) * default_loss(model, (x, y)).item() for x, y in data) / 7
            for name, weight in kept.items():
                model.get_parameter(name).copy_(weight)
        return value

    places = {g.name: (g.spans[-1].tensor, g.spans[-1].index) for g in groups}
    base = loss_without()
    if path == "unit":
        for name, place in places.items():
            changes = [loss_without(place, unit=u) - base for u in range(len(scores[name]))]
            torch.testing.assert_close(scores[name], torch.tensor(changes), rtol=1e-4, atol=1e-7)
    elif path == "group":
        for name, place in places.items():
            assert float(scores[name].sum()) == pytest.approx(loss_without(place) - base, rel=1e-4)
    else:
        total = sum(float(score.sum()) for score in scores.values())
        assert total == pytest.approx(loss_without(*places.values()) - base, rel=1e-4)


def test_negative_changes_are_treated_as_asked():
    torch.manual_seed(0)
    context = Context(Attention(), attention_groups(), data=tokens())
    keep, clip, size = (IntegratedGradients(negative=n, steps=2).score(context)["mlp"] for n in ("keep", "clip", "abs"))
    assert float(keep.min()) < 0
    assert torch.equal(clip, keep.clamp(min=0))
    assert torch.equal(size, keep.abs())


def observed(model, data):
    movement = MovementAccumulator(model)
    for batch in data:
        model.zero_grad()
        default_loss(model, batch).backward()
        movement.observe()
    return movement


def test_a_plan_from_an_accumulator_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model, data = Conv(norm=False), images()
    criterion = Movement(accumulator=observed(model, data), coupled="in")
    plan = sc.plan(model.eval(), data[0][0], criterion=criterion, granularity="channel", target={"sparsity": 0.5})
    plan.save(tmp_path / "plan.json")
    loaded = sc.Plan.load(tmp_path / "plan.json")
    assert loaded.to_json() == plan.to_json()
    for name, weight in plan.apply(model).state_dict().items():
        assert torch.equal(weight, loaded.apply(model).state_dict()[name])
    expected = {"normalize": "none", "frozen": "error", "unused": "error", "coupled": "in", "steps": None, "lr": 0.001}
    assert criterion.options() == expected
    assert Movement(**criterion.options()).accumulator is None
    assert get("movement", criterion.options()) == Movement(coupled="in")


def test_an_accumulator_is_no_option_of_a_recipe():
    with pytest.raises(RecipeError, match="'movement' has no option 'accumulator'"):
        get("movement", {"accumulator": 3})


def test_a_foreign_state_is_refused():
    model = nn.Linear(2, 1, bias=False)
    movement = observed(model, [(torch.ones(1, 2), torch.ones(1, 1))])
    good = movement.state_dict()
    for bad in ({}, {**good, "steps": "3"}, {"sums": 1, "steps": 1}):
        with pytest.raises(InputError, match="no state"):
            movement.load_state_dict(bad)
    for sums in ({"bias": torch.ones(1)}, {"weight": torch.ones(2, 2)}):
        with pytest.raises(InputError, match="no watched parameter"):
            movement.load_state_dict({"sums": sums, "steps": 1})
    assert movement.state_dict() == good
