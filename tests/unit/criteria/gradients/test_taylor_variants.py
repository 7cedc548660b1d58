"""Every variant against its definition, computed one sample at a time; and how the numbers are found."""

import copy

import pytest
import torch
from gradient_nets import Attention, Conv, attention_groups, conv_groups, elements, images, set_statistics, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.criteria.base import Context
from secateur.criteria.gradients import unit_gradients
from secateur.criteria.gradients.head_gate import HeadImportance
from secateur.criteria.gradients.loss_gradient import ROLES
from secateur.criteria.gradients.taps import find_taps
from secateur.criteria.gradients.taylor import Taylor
from secateur.errors import RecipeError
from secateur.model.call import default_loss
from secateur.types import Group, Span

SCENES = {
    "conv with norms": lambda: (set_statistics(Conv()), conv_groups(), images()),
    "conv without norms": lambda: (Conv(norm=False), conv_groups(norm=False), images()),
    "attention": lambda: (Attention(), attention_groups(), tokens()),
    "sequence first": lambda: (Attention(batch_first=False), attention_groups(), tokens()),
    # Five samples of five tokens: the dimensions cannot be told apart by their size.
    "sequence first, square": lambda: (Attention(batch_first=False), attention_groups(), tokens(samples=10, batch=5)),
}


def unit_sums(model, groups, data, coupled):
    """sum of g w per unit, for every sample alone: group name -> [samples, units]."""
    model = copy.deepcopy(model).double().eval()
    rows = {group.name: [] for group in groups}
    for x, y in data:
        for i in range(len(x)):
            model.zero_grad()
            default_loss(model, (x[i : i + 1].double(), y[i : i + 1])).backward()
            for group in groups:
                unit = torch.zeros(group.size, dtype=torch.float64)
                for span in group.spans:
                    if span.role != "state" and (coupled == "all" or span.role in ROLES[coupled]):
                        p = model.get_parameter(span.tensor)
                        unit.index_add_(0, span.index.expand(p.shape).flatten(), (p.grad * p).detach().flatten())
                rows[group.name].append(unit)
    return {name: torch.stack(each) for name, each in rows.items()}


@pytest.mark.parametrize("coupled", ["all", "out", "in"])
@pytest.mark.parametrize("scene", SCENES)
def test_per_sample_and_signed_by_definition(scene, coupled):
    torch.manual_seed(0)
    model, groups, data = SCENES[scene]()
    truth = unit_sums(model, groups, data, coupled)
    context = Context(model, groups, data=data)
    squared = Taylor(reduce="per-sample", coupled=coupled).score(context)
    signed = Taylor(reduce="signed", coupled=coupled).score(context)
    for name, rows in truth.items():
        torch.testing.assert_close(squared[name].double(), rows.square().mean(0), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(signed[name].double(), rows.mean(0).abs(), rtol=1e-3, atol=1e-7)


def test_per_batch_weights_batches_by_size():
    torch.manual_seed(0)
    model, groups, data = set_statistics(Conv()), conv_groups(), images(samples=11, batch=4)
    truth = unit_sums(model, groups, data, "in")
    scores = Taylor(reduce="per-batch").score(Context(model, groups, data=data))
    for name, rows in truth.items():
        parts = [len(part) * part.mean(0).square() for part in rows.split(4)]
        torch.testing.assert_close(scores[name].double(), sum(parts) / 11, rtol=1e-4, atol=1e-9)


def test_head_importance_by_definition():
    torch.manual_seed(0)
    model, groups, data = Attention(), attention_groups(), tokens()
    truth = unit_sums(model, groups, data, "in")
    found = HeadImportance(normalize="none").score(Context(model, groups, data=data))
    shares = HeadImportance().score(Context(model, groups, data=data))
    batches = HeadImportance(normalize="none", reduce="per-batch").score(Context(model, groups, data=data))
    for name, rows in truth.items():
        torch.testing.assert_close(found[name].double(), rows.abs().mean(0), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(shares[name], found[name] / found[name].norm())
        parts = [len(part) * part.mean(0).abs() for part in rows.split(3)]
        torch.testing.assert_close(batches[name].double(), sum(parts) / 7, rtol=1e-4, atol=1e-8)


def test_head_importance_is_the_slope_of_a_mask_on_the_head():
    """|dL/dxi_h| by finite differences, xi multiplying what the output projection reads of the head."""
    torch.manual_seed(0)
    model, data = Attention().double().eval(), tokens(samples=1, batch=1, dtype=torch.float64)
    found = HeadImportance(normalize="none").score(Context(model, attention_groups()[:1], data=data))["attention"]
    for head in range(4):
        losses = []
        for xi in (1 + 1e-5, 1 - 1e-5):
            mask = torch.ones(8, dtype=torch.float64)
            mask[2 * head : 2 * head + 2] = xi
            handle = model.out.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
            losses.append(default_loss(model, data[0]).item())
            handle.remove()
        assert float(found[head]) == pytest.approx(abs(losses[0] - losses[1]) / 2e-5, rel=1e-4)


def test_head_importance_refuses_what_nobody_reads():
    layer = nn.Linear(2, 2)
    group = Group("out", "head", (2,), (Span("weight", torch.tensor([[0], [1]]), "out"),))
    with pytest.raises(RecipeError, match="no weight reads the output of 'out'"):
        HeadImportance().score(Context(layer, [group], data=[(torch.ones(1, 2), torch.ones(1, 2))]))


def formed_names(monkeypatch):
    """Names of parameters whose per-sample gradients were formed, apart from the check of two samples."""
    seen, formed = [], unit_gradients._formed

    def spy(context, weights, batch, way="auto"):
        seen.extend(weights if way == "auto" else ())
        return formed(context, weights, batch, way)

    monkeypatch.setattr(unit_gradients, "_formed", spy)
    return seen


@pytest.mark.parametrize("scene", ["conv with norms", "attention"])
def test_no_gradient_is_formed_where_layers_can_be_read(monkeypatch, scene):
    seen = formed_names(monkeypatch)
    model, groups, data = SCENES[scene]()
    Taylor(coupled="all").score(Context(model, groups, data=data))
    assert seen == []


def test_a_sum_loss_is_noticed(monkeypatch):
    """The loss of one sample is that of a batch that holds it alone, whatever the batch's loss adds up."""
    seen = formed_names(monkeypatch)
    model, groups, data = SCENES["conv without norms"]()
    mean = Taylor().score(Context(model, groups, data=data))
    assert seen == []
    summed = Taylor().score(Context(model, groups, data=data, loss=lambda m, b: default_loss(m, b) * len(b[0])))
    assert seen
    for name, score in mean.items():
        torch.testing.assert_close(summed[name], score, rtol=1e-4, atol=1e-9)


def test_a_weight_used_behind_its_layer_is_noticed():
    """fc.weight is used by the layer and once more as a plain matrix: its hooks see half of it."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.tanh(self.fc(x)) @ self.fc.weight

    torch.manual_seed(0)
    model, data = Twice(), [(torch.randn(4, 4), torch.arange(4))]
    group = Group("fc", "neuron", (4,), (Span("fc.weight", torch.arange(4).view(4, 1), "out"),))
    truth = unit_sums(model, [group], data, "out")["fc"].square().mean(0)
    found = Taylor(coupled="out").score(Context(model, [group], data=data))["fc"]
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-9)


def test_tied_layers_are_read_in_all_their_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(torch.relu(self.first(x)))))

    torch.manual_seed(0)
    model, data = Tied(), [(torch.randn(5, 4), torch.arange(5) % 4)]
    group = Group("first", "neuron", (4,), (Span("first.weight", torch.arange(4).view(4, 1), "out"),))
    truth = unit_sums(model, [group], data, "out")["first"].square().mean(0)
    found = Taylor(coupled="out").score(Context(model, [group], data=data))["first"]
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-9)
    assert len(find_taps(model, [group])[0]) == 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_convolutions_of_other_kinds(transposed, dim):
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    model = nn.Sequential(kind(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.LazyLinear(2))
    data = [(torch.randn(5, 3, 7), torch.arange(5) % 2)]
    model(data[0][0])
    size = model[0].weight.shape[dim]
    group = Group(
        "conv",
        "vector",
        (size,),
        (Span("0.weight", torch.arange(size).view([-1 if d == dim else 1 for d in range(3)]), "self"),),
    )
    assert find_taps(model, [group])[1] == []
    truth = unit_sums(model, [group], data, "all")["conv"].square().mean(0)
    found = Taylor(reduce="per-sample").score(Context(model, [group], data=data))["conv"]
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("reduce", ["signed", "abs", "mean", "squared", "per-sample", "per-batch"])
def test_single_weights(reduce):
    torch.manual_seed(0)
    model, data = set_statistics(Conv()), images(samples=8, batch=4)
    group = elements(model, "conv2.weight")
    wide = copy.deepcopy(model).double().eval()
    rows = []
    for x, y in data:
        for i in range(4):
            loss = default_loss(wide, (x[i : i + 1].double(), y[i : i + 1]))
            rows.append((torch.autograd.grad(loss, wide.conv2.weight)[0] * wide.conv2.weight).detach())
    rows = torch.stack(rows)
    expected = {
        "squared": rows.mean(0).square(),
        "per-sample": rows.square().mean(0),
        "per-batch": torch.stack([rows[:4].mean(0), rows[4:].mean(0)]).square().mean(0),
    }.get(reduce, rows.mean(0).abs())
    found = Taylor(reduce=reduce).score(Context(model, group, data=data))["conv2.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.sampled_from(["signed", "abs", "squared", "per-sample"]), st.sampled_from(["all", "in"]))
def test_the_split_into_batches_does_not_matter(batch, reduce, coupled):
    torch.manual_seed(0)
    model = set_statistics(Conv(width=3, wide=4))
    whole, parts = (
        Taylor(reduce=reduce, coupled=coupled).score(Context(model, conv_groups(3, 4), data=images(9, size)))
        for size in (9, batch)
    )
    for name, score in whole.items():
        torch.testing.assert_close(parts[name], score, rtol=1e-3, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(6)), st.sampled_from(["auto", "signed", "abs", "per-batch"]))
def test_permuted_channels_take_their_scores_with_them(order, reduce):
    torch.manual_seed(0)
    model, data = set_statistics(Conv()), images()
    before = Taylor(reduce=reduce, coupled="all").score(Context(model, conv_groups()[:1], data=data))["conv1"]
    turned = copy.deepcopy(model)
    with torch.no_grad():
        for span in conv_groups()[0].spans:
            tensor = dict(turned.state_dict(keep_vars=True))[span.tensor]
            dim = next(d for d in range(span.index.dim()) if span.index.shape[d] != 1)
            tensor.copy_(tensor.index_select(dim, torch.tensor(order)))
        turned.bn1.running_var.copy_(model.bn1.running_var[list(order)])
    after = Taylor(reduce=reduce, coupled="all").score(Context(turned, conv_groups()[:1], data=data))["conv1"]
    torch.testing.assert_close(after, before[list(order)], rtol=1e-3, atol=1e-8)


def test_first_order_predicts_the_loss_of_removing_small_channels():
    """A channel that is nearly off: dL of switching it off is -sum g w up to second order."""
    torch.manual_seed(0)
    model, data = set_statistics(Conv()).double().eval(), images(dtype=torch.float64)
    with torch.no_grad():
        model.conv2.weight[:, 2] *= 1e-4
    score = Taylor(reduce="signed").score(Context(model, conv_groups()[:1], data=data))["conv1"][2]

    def mean_loss():
        return sum(len(y) * default_loss(model, (x, y)).item() for x, y in data) / 11

    before = mean_loss()
    with torch.no_grad():
        model.conv2.weight[:, 2] = 0
    assert abs(mean_loss() - before) == pytest.approx(float(score), rel=1e-2)


def test_batch_norm_in_train_mode_would_cancel_the_filter():
    """Why the model runs in eval mode: in train mode the sum of g w over a filter is 0."""
    torch.manual_seed(0)
    model, (x, y) = set_statistics(Conv()).double().train(), images(8, 8, dtype=torch.float64)[0]
    with torch.no_grad():
        model.bn1.eps = 1e-12
    grad = torch.autograd.grad(default_loss(model, (x, y)), model.conv1.weight)[0]
    assert float((grad * model.conv1.weight).detach().sum((1, 2, 3)).abs().max()) < 1e-8
    spans = (Span("conv1.weight", torch.arange(6).view(6, 1, 1, 1), "self"),)
    scores = Taylor(reduce="signed").score(Context(model, [Group("conv1", "vector", (6,), spans)], data=[(x, y)]))
    assert float(scores["conv1"].min()) > 1e-5
    assert model.training


def test_normalisation_and_words():
    torch.manual_seed(0)
    model, data = set_statistics(Conv()), images()
    raw, mean, norm = (
        Taylor(normalize=n).score(Context(model, conv_groups(), data=data)) for n in ("none", "mean", "l2")
    )
    for name, score in raw.items():
        torch.testing.assert_close(mean[name], score / score.mean())
        torch.testing.assert_close(norm[name], score / score.norm())
    for options in ({"reduce": "sum"}, {"coupled": "inn"}, {"normalize": "l1"}, {"frozen": "yes"}, {"unused": "no"}):
        with pytest.raises(RecipeError, match="not known"):
            Taylor(**options)
