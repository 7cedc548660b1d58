"""Wanda and RIA for every layout of a weight, against the definition written out."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.criteria.activations.ria import RIA, relative_importance
from secateur.criteria.activations.wanda import Wanda
from secateur.criteria.base import Context
from secateur.errors import RecipeError, UnsupportedError
from secateur.types import Group, Span


def element(model, name):
    return Group(name, "element", tuple(model.get_parameter(name).shape), (Span(name, None, "self"),))


def scored(criterion, model, name, data):
    return criterion.score(Context(model.eval(), [element(model, name)], data=data))[name]


def split(x):
    return [x[:1], x[1:]]


def test_linear_on_sequences():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(5, 7, 3)
    expected = model.weight.detach().double().abs() * x.double().flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(scored(Wanda(), model, "weight", split(x)), expected.float())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_have_one_norm_per_channel(groups, transposed):
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model, x = kind(4, 8, (3, 2), stride=2, groups=groups), torch.randn(3, 4, 6, 5)
    norm = x.double().square().sum((0, 2, 3)).sqrt()
    weight = model.weight.detach().double().abs()
    expected = torch.empty_like(weight)
    for a in range(weight.shape[0]):
        for b in range(weight.shape[1]):
            channel = a if transposed else a // (8 // groups) * (4 // groups) + b
            expected[a, b] = weight[a, b] * norm[channel]
    torch.testing.assert_close(scored(Wanda(), model, "weight", split(x)), expected.float())


class Turned(nn.Module):
    """A weight that lies as [in, out], as in transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 3), self.weight).view(*x.shape[:-1], 5)


def test_weights_that_lie_the_other_way_round():
    torch.manual_seed(0)
    model, x = Turned(), torch.randn(4, 2, 3)
    norm = x.double().flatten(0, 1).norm(dim=0)
    weight = model.weight.detach().double()
    torch.testing.assert_close(scored(Wanda(), model, "weight", split(x)), (weight.abs() * norm[:, None]).float())
    plain = nn.Linear(3, 5)
    plain.weight.data.copy_(model.weight.T)
    torch.testing.assert_close(
        scored(RIA(), model, "weight", split(x)), scored(RIA(), plain, "weight", split(x)).T.contiguous()
    )


def test_slices_of_one_weight_have_inputs_of_their_own():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=True)
    q, kv = torch.randn(3, 4, 6), torch.randn(3, 5, 6)
    context = Context(model.eval(), [element(model, "in_proj_weight")], data=[(q, kv, kv, torch.zeros(3))])
    found = Wanda().score(context)["in_proj_weight"]
    norms = [x.double().flatten(0, 1).norm(dim=0) for x in (q, kv, kv)]
    expected = model.in_proj_weight.detach().double().abs() * torch.stack(norms).repeat_interleave(6, 0)
    torch.testing.assert_close(found, expected.float())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        self.h = F.relu(self.layer(x))
        return self.layer(self.h)


def test_a_weight_that_is_used_twice_sums_over_both_inputs():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 3)
    found = scored(Wanda(), model, "layer.weight", [x])
    model(x)
    norm = torch.cat([x, model.h]).detach().double().norm(dim=0)
    torch.testing.assert_close(found, (model.layer.weight.detach().double().abs() * norm).float())


def test_ria_is_the_published_formula():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(4, 3)), rng.normal(size=(10, 3))
    magnitude = np.abs(weight)
    relative = magnitude / magnitude.sum(1, keepdims=True) + magnitude / magnitude.sum(0, keepdims=True)
    model = nn.Linear(3, 4).double()
    model.weight.data.copy_(torch.from_numpy(weight))
    for power in (0.0, 0.5, 1.0):
        expected = relative * np.linalg.norm(x, axis=0) ** power
        found = scored(RIA(power=power), model, "weight", split(torch.from_numpy(x)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("outputs", [0, 1])
def test_groups_of_a_convolution_have_columns_of_their_own(outputs):
    weight = torch.randn(6, 4, 3, 3) if outputs == 0 else torch.randn(4, 6, 3, 3)
    blocks = [relative_importance(block, outputs) for block in weight.chunk(2, 0)]
    torch.testing.assert_close(relative_importance(weight, outputs, 2), torch.cat(blocks))


def test_zero_weights_score_zero():
    weight = torch.zeros(2, 3)
    weight[0, 0] = 2.0
    assert relative_importance(weight).tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, ids):
        return self.out(self.table(ids))


def test_a_weight_without_input_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"table\.weight"):
        scored(Wanda(), Embedded(), "table.weight", [torch.tensor([[1, 2]])])


def test_a_group_without_weight_matrix_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    norm = Group("norm", "channel", (2,), (Span("1.weight", torch.arange(2), "scale"),))
    with pytest.raises(RecipeError, match="norm"):
        Wanda().score(Context(model, [norm], data=[torch.randn(2, 1, 3, 3)]))


def test_a_negative_power_is_refused():
    with pytest.raises(RecipeError, match="power"):
        RIA(power=-1.0)


def test_a_channel_is_the_sum_over_its_weight_matrices():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4)).eval(), torch.randn(5, 3)
    spans = (Span("0.weight", torch.tensor([[0], [1]]), "out"), Span("2.weight", torch.tensor([[0, 1]]), "in"))
    found = Wanda().score(Context(model, [Group("0", "neuron", (2,), spans)], data=[x]))["0"]
    h = model[:2](x).detach().double()
    first = (model[0].weight.detach().double().abs() * x.double().norm(dim=0)).sum(1)
    second = (model[2].weight.detach().double().abs() * h.norm(dim=0)).sum(0)
    torch.testing.assert_close(found, (first + second).float())
