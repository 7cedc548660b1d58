"""Gates: neutral at 1, trainable, folded exactly, removed without a trace, and scored."""

import copy

import pytest
import torch
from gradient_nets import (
    Attention,
    Conv,
    along,
    attention_groups,
    conv_groups,
    elements,
    images,
    set_statistics,
    tokens,
)
from torch import nn

from secateur.criteria.base import Context
from secateur.criteria.gradients.gates import GateScore
from secateur.criteria.gradients.taylor import Taylor
from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.model.call import default_loss
from secateur.model.gates import gates_of, insert_gates
from secateur.types import Group, Span

SCENES = {
    "conv": lambda: (set_statistics(Conv()), conv_groups(), images()),
    "conv without norm": lambda: (Conv(norm=False), conv_groups(norm=False), images()),
    "attention": lambda: (Attention(), attention_groups(), tokens()),
    "elements": lambda: (Attention(), elements(Attention(), "up.weight", "qkv.weight"), tokens()),
}


def scene(name):
    torch.manual_seed(0)
    model, groups, data = SCENES[name]()
    return model.eval(), groups, data


def state_of(model):
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


def assert_same_state(before, model):
    after = state_of(model)
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], value)


@pytest.mark.parametrize("name", SCENES)
def test_inserted_gates_change_nothing_and_leave_no_trace(name):
    model, groups, data = scene(name)
    before, out = state_of(model), model(data[0][0])
    classes = [type(m) for m in model.modules()]
    gates = insert_gates(model, groups)
    assert torch.equal(model(data[0][0]), out)
    assert {n: tuple(z.shape) for n, z in gates.values.items()} == {g.name: g.shape for g in groups}
    for z in gates.values.values():
        z.data.uniform_(0.1, 2)
    assert not torch.equal(model(data[0][0]), out)
    gates.remove()
    assert gates.values == {}
    assert [type(m) for m in model.modules()] == classes
    assert_same_state(before, model)


@pytest.mark.parametrize("name", SCENES)
def test_folding_is_exact(name):
    model, groups, data = scene(name)
    names = [n for n, _ in model.named_parameters()]
    gates = insert_gates(model, groups)
    for z in gates.values.values():
        z.data.uniform_(-1, 2)
    out = model(data[0][0])
    gates.fold()
    assert torch.equal(model(data[0][0]), out)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize(
    ("norm", "gated"), [(True, ["bn1.weight", "bn1.bias"]), (False, ["conv1.weight", "conv1.bias"])]
)
def test_producer_gates_sit_behind_the_norm(norm, gated):
    """y -> z y at the producer's output; with a norm on its scale and bias, without on the layer's."""
    torch.manual_seed(0)
    model = set_statistics(Conv(norm=norm)).eval()
    spans = tuple(s for s in conv_groups(norm=norm)[0].spans if not s.tensor.startswith("depth"))
    group = Group("conv1", "channel", (6,), spans)
    x, z = images()[0][0], torch.rand(6) + 0.5
    expected = model.bn1(model.conv1(x)) * z.view(1, 6, 1, 1)
    gates = insert_gates(model, [group], at="producer")
    assert [s.tensor for s in gates.spans(group)].sort() == gated.sort()
    gates.values["conv1"].data = z
    torch.testing.assert_close(model.bn1(model.conv1(x)), expected)
    gates.fold()
    torch.testing.assert_close(model.bn1(model.conv1(x)), expected)


def test_producer_without_a_clear_place_is_refused():
    model = Conv()
    with pytest.raises(UnsupportedError, match="several layers or norms"):
        insert_gates(model, conv_groups(), at="producer")
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))
    spans = (Span("0.weight", along(4, 0, 4), "out"), Span("1.running_mean", torch.arange(4), "state"))
    with pytest.raises(UnsupportedError, match="a norm without weight"):
        insert_gates(bare, [Group("conv", "channel", (4,), spans)], at="producer")
    assert not gates_of(model).values
    assert not gates_of(bare).values


def test_refusals_change_nothing():
    model = Conv()
    before = state_of(model)
    alien = Group("alien", "channel", (6,), (Span("conv9.weight", along(6, 1, 4), "in"),))
    unread = Group("unread", "channel", (6,), (Span("conv1.weight", along(6, 0, 4), "out"),))
    for groups, error in (([*conv_groups(), alien], InputError), ([*conv_groups(), unread], RecipeError)):
        with pytest.raises(error):
            insert_gates(model, groups)
        assert_same_state(before, model)
    insert_gates(model, conv_groups()[:1])
    with pytest.raises(RecipeError, match="has gates already"):
        insert_gates(model, conv_groups())


def test_tied_weights_share_one_gate_and_fold_once():
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    net["b"].weight = net["a"].weight
    start = net["a"].weight.detach().clone()
    gates = insert_gates(net, [Group("a", "neuron", (3,), (Span("a.weight", along(3, 1, 2), "in"),))])
    assert len(list(net.parameters())) == 2
    gates.values["a"].data.fill_(3.0)
    assert torch.equal(net["b"].weight, 3 * start)
    gates.fold()
    assert net["a"].weight is net["b"].weight
    assert torch.equal(net["a"].weight, 3 * start)


def test_gates_train_with_a_penalty_without_any_norm():
    """A planted useless neuron: its gate goes to zero under L1, the useful one's does not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, 0.02]]))
        net[2].bias.zero_()
    group = Group("hidden", "neuron", (2,), (Span("2.weight", along(2, 1, 2), "in"),))
    gates = insert_gates(net, [group])
    z = gates.values["hidden"]
    optimizer = torch.optim.SGD([z], lr=0.1)
    x = torch.rand(64, 2)
    for _ in range(300):
        optimizer.zero_grad()
        ((net(x) - x[:, :1]).square().mean() + 0.05 * z.abs().sum()).backward()
        optimizer.step()
    scores = GateScore(by="magnitude").score(Context(net, [group]))["hidden"]
    assert scores[0] > 0.8
    assert scores[1] < 0.05


@pytest.mark.parametrize("by", ["gradient", "per-sample"])
@pytest.mark.parametrize("name", SCENES)
def test_scores_are_derivatives_with_respect_to_the_gates(name, by):
    model, groups, data = scene(name)
    fresh = GateScore(by=by).score(Context(model, groups, data=data))
    gates = insert_gates(model, groups)
    torch.testing.assert_close(GateScore(by=by).score(Context(model, groups, data=data)), fresh)
    for z in gates.values.values():
        z.data.uniform_(0.5, 1.5)
    before = state_of(model)
    found = GateScore(by=by).score(Context(model, groups, data=data))
    assert_same_state(before, model)
    slopes = {group.name: [] for group in groups}
    for x, y in data:
        for i in range(len(x)):
            loss = default_loss(model, (x[i : i + 1], y[i : i + 1]))
            z = [gates.values[group.name] for group in groups]
            for group, one, g in zip(groups, z, torch.autograd.grad(loss, z), strict=True):
                slopes[group.name].append((one * g).detach())
    for group in groups:
        rows = torch.stack(slopes[group.name])
        expected = rows.mean(0).abs() if by == "gradient" else rows.square().mean(0)
        torch.testing.assert_close(found[group.name], expected, rtol=1e-3, atol=1e-8)


def test_producer_gates_are_scored_where_they_are():
    torch.manual_seed(0)
    model, data = set_statistics(Conv()).eval(), images()
    spans = tuple(s for s in conv_groups()[0].spans if not s.tensor.startswith("depth"))
    group = Group("conv1", "channel", (6,), spans)
    gates = insert_gates(model, [group], at="producer")
    found = GateScore(by="gradient").score(Context(model, [group], data=data))["conv1"]
    loss = sum(len(y) * default_loss(model, (x, y)) for x, y in data) / 11
    slope = torch.autograd.grad(loss, gates.values["conv1"])[0]
    torch.testing.assert_close(found, slope.abs(), rtol=1e-3, atol=1e-7)


def test_a_fresh_gate_is_taylor_at_the_consumer():
    model, groups, data = scene("conv")
    context = Context(model, groups, data=data)
    torch.testing.assert_close(GateScore().score(context), Taylor(reduce="per-sample", coupled="in").score(context))


def test_the_size_of_gates_that_are_not_there_is_refused():
    with pytest.raises(RecipeError, match="has no gates"):
        GateScore(by="magnitude").score(Context(Conv(), conv_groups()))


def test_copies_and_state_dicts_carry_the_gates():
    model, groups, data = scene("conv")
    insert_gates(model, groups).values["conv1"].data.uniform_(0.5, 1.5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(data[0][0]), model(data[0][0]))
    other, *_ = scene("conv")
    insert_gates(other, groups)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(data[0][0]), model(data[0][0]))


def test_another_parametrisation_beside_a_gate_is_refused():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    net = nn.Sequential(nn.Linear(2, 2))
    gates = insert_gates(net, [Group("a", "neuron", (2,), (Span("0.weight", along(2, 1, 2), "in"),))])
    nn.utils.parametrize.register_parametrization(net[0], "weight", Double())
    with pytest.raises(UnsupportedError, match="another parametrisation"):
        gates.fold()
