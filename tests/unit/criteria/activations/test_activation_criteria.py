"""APoZ, mean activation and variance against numpy, on networks where the answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from secateur.api import score
from secateur.criteria.activations.activation_variance import ActivationVariance
from secateur.criteria.activations.apoz import APoZ
from secateur.criteria.activations.lasso import Lasso
from secateur.criteria.activations.mean_activation import MeanActivation
from secateur.criteria.activations.ria import RIA
from secateur.criteria.base import Context
from secateur.errors import InputError, NonFiniteError, RecipeError, UnsupportedError
from secateur.testing import check_criterion
from secateur.types import Group, Span

# The defaults are run by tests/contract; these are the other ways through the code.
VARIANTS = {
    "apoz": lambda: APoZ(epsilon=0.1),
    "mean-activation": lambda: MeanActivation(norm="l2"),
    "ria": lambda: RIA(power=0.0),
    "lasso": lambda: Lasso(stages=1, positions=None),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", VARIANTS)
def test_contract_of_the_options(name):
    assert check_criterion(VARIANTS[name])["scores are finite"] == ""


def inputs_group(units, kind="neuron", weight="1.weight"):
    return Group("inputs", kind, (units,), (Span(weight, torch.arange(units).view(1, -1), "in"),))


def on_inputs(criterion, data, *, first=None, kind="neuron"):
    """Scores of the inputs of a linear layer behind `first`, which makes the data the activation itself."""
    width = data[0].shape[-1]
    model = nn.Sequential(first or nn.Identity(), nn.Linear(width, 1))
    return criterion.score(Context(model, [inputs_group(width, kind)], data=data))["inputs"]


# Against numpy


@st.composite
def split_data(draw):
    values = np.array(
        draw(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=2, max_size=12)), np.float32
    )
    cut = draw(st.integers(1, len(values) - 1))
    return values, [torch.from_numpy(values[:cut]), torch.from_numpy(values[cut:])]


@settings(max_examples=15, deadline=None)
@given(split_data())
def test_statistics_equal_numpy_whatever_the_batches(case):
    values, data = case
    wide = values.astype(np.float64)
    np.testing.assert_allclose(on_inputs(MeanActivation(), data), np.abs(wide).mean(0), rtol=1e-5, atol=1e-7)
    rms = np.sqrt((wide**2).mean(0))
    np.testing.assert_allclose(on_inputs(MeanActivation(norm="l2"), data), rms, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(on_inputs(ActivationVariance(), data), wide.var(0), rtol=1e-4, atol=1e-6)
    alive = (np.maximum(wide, 0) != 0).mean(0)
    np.testing.assert_allclose(on_inputs(APoZ(), data, first=nn.ReLU()), alive, rtol=1e-6)


def test_variance_does_not_cancel_beside_a_large_mean():
    data = [torch.tensor([[4096.0, 0.0], [4097.0, 0.0]]), torch.tensor([[4098.0, 0.0]])]
    assert on_inputs(ActivationVariance(), data).tolist() == pytest.approx([2 / 3, 0.0], rel=1e-4)


class Conv(nn.Module):
    def __init__(self, flat=False):
        super().__init__()
        self.conv, self.flat = nn.Conv2d(1, 4, 1), flat
        self.read = nn.Linear(4 * 4, 2) if flat else nn.Conv2d(4, 2, 1)

    def forward(self, x):
        self.h = F.relu(self.conv(x))
        return self.read(F.max_pool2d(self.h, 2).flatten(1)) if self.flat else self.read(self.h).mean((2, 3))


@pytest.mark.parametrize("flat", [False, True])
def test_channels_count_over_batch_and_space(flat):
    torch.manual_seed(0)
    model, x = Conv(flat).eval(), torch.randn(6, 1, 4, 4)
    data = [x[:1], x[1:]]
    model(x)
    h = model.h.detach()
    pooled = (F.max_pool2d(h, 2) if flat else h).double()
    mean = score(model, x, criterion=MeanActivation(), granularity="channel", data=data)["conv"]
    var = score(model, x, criterion=ActivationVariance(), granularity="channel", data=data)["conv"]
    torch.testing.assert_close(mean, pooled.mean((0, 2, 3)).float())
    torch.testing.assert_close(var, pooled.var((0, 2, 3), correction=0).float())
    apoz = score(model, x, criterion=APoZ(), granularity="channel", data=data)["conv"]
    torch.testing.assert_close(apoz, (h != 0).double().mean((0, 2, 3)).float())  # behind the ReLU, before pooling


# APoZ


class Residual(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.stem, self.a, self.b, self.out = (nn.Linear(n, m) for n, m in ((3, 6), (6, 5), (5, 6), (6, 2)))
        self.activation = activation

    def forward(self, x):
        h = self.activation(self.stem(x))
        h = self.activation(h + self.b(self.activation(self.a(h))))
        self.h = h
        return self.out(h)


def test_relus_along_a_residual_stream_count_alike():
    torch.manual_seed(1)
    model, x = Residual(F.relu).eval(), torch.randn(32, 3)
    found = score(model, x, criterion=APoZ(), granularity="neuron", data=[x])["stem"]
    model(x)
    first = (F.relu(model.stem(x)) != 0).double().mean(0)
    last = (model.h != 0).double().mean(0)
    torch.testing.assert_close(found, ((first + last) / 2).float())


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish(), nn.Threshold(0.0, 0.0)])
def test_what_cuts_off_at_zero_is_a_relu(activation):
    data = [torch.tensor([[-4.0, 1.0], [2.0, -5.0], [-4.0, 8.0]])]
    torch.testing.assert_close(on_inputs(APoZ(), data, first=activation), torch.tensor([1 / 3, 2 / 3]))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.Hardtanh(), nn.Identity()])
def test_what_gives_no_zeros_is_refused(activation):
    with pytest.raises(UnsupportedError, match="epsilon"):
        on_inputs(APoZ(), [torch.randn(4, 2)], first=activation)


def test_epsilon_is_relative_to_the_layer():
    data = [torch.tensor([[3.0, 0.01]]), torch.tensor([[-4.0, 0.2], [0.1, 5.0]])]
    values = torch.cat(data).double()
    bound = 0.05 * values.square().mean().sqrt()
    expected = (values.abs() > bound).double().mean(0).float()
    torch.testing.assert_close(on_inputs(APoZ(epsilon=0.05), data), expected)
    torch.testing.assert_close(on_inputs(APoZ(epsilon=0.05), [1000 * x for x in data]), expected)


def test_epsilon_needs_data_that_can_be_read_twice():
    model = nn.Sequential(nn.GELU(), nn.Linear(2, 1))
    context = Context(model, [inputs_group(2)], data=iter([torch.randn(3, 2)]))
    with pytest.raises(InputError, match="only once"):
        APoZ(epsilon=0.1).score(context)


@pytest.mark.parametrize("epsilon", [-0.1, 1.0, float("nan")])
def test_an_epsilon_out_of_range_is_refused(epsilon):
    with pytest.raises(RecipeError, match="epsilon"):
        APoZ(epsilon=epsilon)


# Heads, refusals


class Attention(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads, self.head_dim = heads, width // heads

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o(self.mixed.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))


def test_a_head_is_the_mean_over_its_features():
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(6, 5, 8)
    [found] = score(model, x, criterion=ActivationVariance(), granularity="head", data=[x[:1], x[1:]]).values()
    model(x)
    expected = model.mixed.detach().double().var((0, 2), correction=0).mean(1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    [mean] = score(model, x, criterion=MeanActivation(), granularity="head", data=[x]).values()
    torch.testing.assert_close(mean, model.mixed.detach().abs().mean((0, 2, 3)))


def test_a_nan_in_the_activations_is_refused():
    with pytest.raises(NonFiniteError):
        on_inputs(MeanActivation(), [torch.tensor([[1.0, float("nan")]])])


def test_an_iterator_is_read_once():
    data = iter([torch.tensor([[1.0, -4.0]]), torch.tensor([[-3.0, 0.0]])])
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 1))
    found = MeanActivation().score(Context(model, [inputs_group(2)], data=data))["inputs"]
    assert found.tolist() == [2.0, 2.0]
