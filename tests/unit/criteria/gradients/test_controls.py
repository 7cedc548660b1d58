"""Random scores, geometric median and norm scales against their definitions."""

import numpy as np
import pytest
import torch
from gradient_nets import Attention, Conv, along, attention_groups, conv_groups, elements, set_statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.criteria.base import Context
from secateur.criteria.weights.bn_scale import NormScale
from secateur.criteria.weights.geometric_median import GeometricMedian
from secateur.criteria.weights.random_control import Random
from secateur.errors import RecipeError
from secateur.types import Group, Span


def group_of(rows):
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(rows)
    return Context(layer, [Group("rows", "vector", (len(rows),), (Span("weight", along(len(rows), 0, 2), "self"),))])


def sums_of_distances(rows):
    return np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(-1)).sum(1)


def test_random_depends_on_seed_and_name_alone():
    model = Conv()
    one, two = elements(model, "conv1.weight", "conv2.weight")
    first = Random().score(Context(model, [one, two], seed=3))
    alone = Random().score(Context(model, [two], seed=3))
    assert torch.equal(first["conv2.weight"], alone["conv2.weight"])
    assert not torch.equal(first["conv2.weight"], Random().score(Context(model, [two], seed=4))["conv2.weight"])
    assert torch.equal(alone["conv2.weight"], Random(seed=3).score(Context(model, [two], seed=4))["conv2.weight"])
    renamed = Group("other", two.granularity, two.shape, two.spans)
    assert not torch.equal(alone["conv2.weight"], Random(seed=3).score(Context(model, [renamed]))["other"])


def test_random_is_uniform():
    layer = nn.Linear(200, 200)
    score = Random().score(Context(layer, elements(layer, "weight")))["weight"]
    assert float(score.min()) >= 0
    assert float(score.max()) < 1
    assert abs(float(score.mean()) - 0.5) < 5 / (12 * score.numel()) ** 0.5
    assert len(score.unique()) > 0.99 * score.numel()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**16))
def test_geometric_median_by_definition(units, width, seed):
    rows = np.random.default_rng(seed).normal(size=(units, width)).round(1)  # rounding makes duplicates
    scores = GeometricMedian().score(group_of(rows))["rows"]
    np.testing.assert_allclose(scores.numpy(), sums_of_distances(rows), rtol=1e-5, atol=1e-6)
    mean = GeometricMedian(reduce="mean").score(group_of(rows))["rows"]
    np.testing.assert_allclose(mean.numpy() * max(units - 1, 1) * width**0.5, scores.numpy(), rtol=1e-5, atol=1e-6)


def test_geometric_median_of_single_weights_sorts():
    rows = np.random.default_rng(0).normal(size=(30, 20))
    layer = group_of(rows).model
    scores = GeometricMedian().score(Context(layer, elements(layer, "weight")))["weight"]
    np.testing.assert_allclose(scores.numpy().ravel(), np.abs(rows.ravel()[:, None] - rows.ravel()).sum(1), rtol=1e-5)


def test_a_duplicate_goes_before_an_outlier_of_smaller_norm():
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [-0.2, 0.0]])
    assert int(GeometricMedian().score(group_of(rows))["rows"].argmin()) in (0, 1)


def test_geometric_median_of_coupled_layers_and_heads():
    """Channels: conv and depthwise slices side by side. Heads: the rows of q, k and v, without biases."""
    torch.manual_seed(0)
    model = Conv()
    rows = torch.cat([model.conv1.weight.flatten(1), model.depth.weight.flatten(1)], 1).detach().numpy()
    scores = GeometricMedian().score(Context(model, conv_groups()[:1]))["conv1"]
    np.testing.assert_allclose(scores.numpy(), sums_of_distances(rows), rtol=1e-5)
    model = Attention()
    rows = model.qkv.weight.detach().view(3, 4, 2, 8).transpose(0, 1).reshape(4, -1).numpy()
    scores = GeometricMedian().score(Context(model, attention_groups()[:1]))["attention"]
    np.testing.assert_allclose(scores.numpy(), sums_of_distances(rows), rtol=1e-5)


def test_geometric_median_pads_units_of_unequal_size():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0, 1.0]])
    group = Group("g", "block", (2,), (Span("weight", torch.tensor([[0, 0, 1]]), "self"),))
    scores = GeometricMedian().score(Context(layer, [group]))["g"]
    assert scores.tolist() == pytest.approx([20**0.5, 20**0.5])


def test_large_layers_are_done_in_pieces(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(23, 7))
    whole = GeometricMedian().score(group_of(rows))["rows"]
    monkeypatch.setattr("secateur.criteria.weights.geometric_median._CHUNK", 5)
    torch.testing.assert_close(GeometricMedian().score(group_of(rows))["rows"], whole)


def test_geometric_median_needs_producing_weights():
    layer = nn.Linear(2, 2)
    group = Group("in", "neuron", (2,), (Span("weight", along(2, 1, 2), "in"),))
    with pytest.raises(RecipeError, match="compares producing weights"):
        GeometricMedian().score(Context(layer, [group]))


@pytest.mark.parametrize(("reduce", "expected"), [("l2", 5.0), ("mean", 3.5), ("max", 4.0), ("sum", 7.0)])
def test_several_scales_of_one_channel(reduce, expected):
    net = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(2)])
    net[0].weight.data, net[1].weight.data = torch.tensor([3.0, 1.0]), torch.tensor([-4.0, 1.0])
    spans = tuple(Span(f"{i}.weight", torch.arange(2), "scale") for i in range(2))
    scores = NormScale(reduce=reduce).score(Context(net, [Group("stream", "channel", (2,), spans)]))
    assert scores["stream"][0].item() == pytest.approx(expected)


def test_l2_is_the_deviation_of_the_sum_of_branches():
    torch.manual_seed(0)
    branches = [nn.BatchNorm1d(3) for _ in range(2)]
    for norm in branches:
        nn.init.uniform_(norm.weight, 0.2, 2)
    total = sum(norm(torch.randn(20000, 3)) for norm in branches).std(0)
    net = nn.ModuleList(branches)
    spans = tuple(Span(f"{i}.weight", torch.arange(3), "scale") for i in range(2))
    scores = NormScale().score(Context(net, [Group("stream", "channel", (3,), spans)]))["stream"]
    torch.testing.assert_close(scores, total.detach(), rtol=0.03, atol=0)


def test_channels_without_a_norm_are_refused_or_kept():
    model = set_statistics(Conv())
    with pytest.raises(RecipeError, match="no norm scales the units of 'conv2'"):
        NormScale().score(Context(model, conv_groups()))
    scores = NormScale(missing="keep").score(Context(model, conv_groups()))
    torch.testing.assert_close(scores["conv1"], model.bn1.weight.detach().abs())
    assert float(scores["conv2"].min()) > float(scores["conv1"].max())
    # Half of the units have a norm (a concatenation): the others are not taken for zero.
    half = Group("cat", "channel", (12,), (Span("bn1.weight", torch.arange(6), "scale"),))
    with pytest.raises(RecipeError, match="'cat'"):
        NormScale().score(Context(model, [half]))
    assert float(NormScale(missing="keep").score(Context(model, [half]))["cat"][6:].min()) > 1e29


def test_equal_scales_tie():
    model = Conv()
    assert len(NormScale().score(Context(model, conv_groups()[:1]))["conv1"].unique()) == 1


def test_unknown_words_are_refused():
    for make in (
        lambda: NormScale(reduce="l3"),
        lambda: NormScale(missing="skip"),
        lambda: GeometricMedian(reduce="max"),
    ):
        with pytest.raises(RecipeError, match="not known"):
            make()
