"""Gradient criteria refuse what they cannot score, by name, and never score something else instead."""

import pytest
import torch
from gradient_nets import Attention, Conv, attention_groups, conv_groups, elements, images, tokens
from torch import nn

from secateur.criteria.base import Context
from secateur.criteria.gradients.gates import GateScore
from secateur.criteria.gradients.gradient import Gradient
from secateur.criteria.gradients.grasp import Grasp
from secateur.criteria.gradients.head_gate import HeadImportance
from secateur.criteria.gradients.integrated import IntegratedGradients
from secateur.criteria.gradients.movement import Movement
from secateur.criteria.gradients.snip import Snip
from secateur.criteria.gradients.taylor import Taylor
from secateur.errors import InputError, NonFiniteError, RecipeError
from secateur.types import Group, Span

ALL = [
    Gradient,
    Snip,
    Grasp,
    Movement,
    GateScore,
    HeadImportance,
    Taylor,
    lambda **options: Taylor(reduce="abs", **options),
    lambda **options: Taylor(reduce="per-batch", **options),
    lambda **options: HeadImportance(reduce="per-batch", **options),
    lambda **options: IntegratedGradients(steps=1, **options),
]
each = pytest.mark.parametrize("make", ALL)


@each
def test_frozen_parameters_are_named(make):
    model = Conv(norm=False)
    model.conv2.weight.requires_grad_(False)
    context = Context(model, conv_groups(norm=False), data=images())
    with pytest.raises(InputError, match=r"conv2\.weight(.|\n)*requires_grad is False"):
        make(frozen="error").score(context)
    scores = make(frozen="score").score(context)
    assert float(scores["conv1"].abs().sum()) > 0
    assert not model.conv2.weight.requires_grad


@each
def test_parameters_without_a_gradient_are_named(make):
    class Aside(Conv):
        def __init__(self):
            super().__init__(norm=False)
            self.unused = nn.Linear(8, 6)

    group = conv_groups(norm=False)[1]
    spans = tuple(
        type(s)(
            "unused.weight" if s.role == "in" else s.tensor,
            torch.arange(8).view(1, 8) if s.role == "in" else s.index,
            s.role,
        )
        for s in group.spans
    )
    group = type(group)(group.name, group.granularity, group.shape, spans)
    context = Context(Aside(), [group], data=images())
    with pytest.raises(InputError, match=r"does not depend on 'unused\.weight'"):
        make().score(context)
    assert make(unused="zero").score(context)["conv2"].isfinite().all()


@each
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_values_are_refused(make, where):
    def loss(model, batch):
        out = model(batch[0]).square().mean()
        # The root has the value 0 and the slope Inf there, which the chain rule turns into NaN.
        return out * torch.inf if where == "loss" else out + (out - out.detach()).abs().sqrt()

    with pytest.raises(NonFiniteError):
        make().score(Context(Conv(norm=False), conv_groups(norm=False), data=images(), loss=loss))


@each
def test_a_loss_that_is_no_scalar_is_refused(make):
    context = Context(Conv(norm=False), conv_groups(norm=False), data=images(), loss=lambda m, b: m(b[0]))
    with pytest.raises(InputError, match="scalar"):
        make().score(context)


@each
def test_a_detached_loss_is_refused(make):
    def loss(model, batch):
        return model(batch[0]).detach().sum()

    with pytest.raises(InputError, match="does not depend on"):
        make().score(Context(Conv(norm=False), conv_groups(norm=False), data=images(), loss=loss))


def test_buffers_have_no_gradient():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(2, 2))

    group = elements(nn.Linear(2, 2), "weight")
    with pytest.raises(InputError, match="hold no weights"):
        Gradient().score(Context(Buffered(), group, data=[torch.ones(1)], loss=lambda m, b: m.weight.sum()))


def test_buffers_beside_parameters_do_not_count():
    """A table of positions goes with the units of a stream; the scores are those of the weights."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.register_buffer("table", torch.ones(4))

        def forward(self, x):
            return self.layer(x) + self.table

    torch.manual_seed(0)
    model, data = Stream(), [(torch.randn(4, 3), torch.arange(4))]
    spans = (Span("layer.weight", torch.arange(4).view(4, 1), "out"), Span("table", torch.arange(4), "out"))
    whole, bare = (Group("layer", "neuron", (4,), spans[:n]) for n in (2, 1))
    scores = Snip().score(Context(model, [whole], data=data))["layer"]
    assert torch.equal(scores, Snip().score(Context(model, [bare], data=data))["layer"])


def test_gradient_norms_are_those_of_the_gradient():
    torch.manual_seed(0)
    model, data = Attention(), tokens(samples=6, batch=6)
    model.eval()
    grad = torch.autograd.grad(
        nn.functional.cross_entropy(model(data[0][0]), data[0][1]), [model.up.weight, model.up.bias, model.down.weight]
    )
    by_neuron = torch.cat([grad[0], grad[1][:, None], grad[2].T], 1)
    context = Context(model, attention_groups()[1:], data=data)
    for norm, power in (("l1", 1), ("l2", 2)):
        torch.testing.assert_close(
            Gradient(norm=norm).score(context)["mlp"], by_neuron.norm(power, dim=1), rtol=1e-4, atol=1e-7
        )
    mean = Gradient(reduce="mean").score(context)["mlp"]
    torch.testing.assert_close(mean, by_neuron.abs().mean(1), rtol=1e-4, atol=1e-8)


def test_snip_shares_add_up_and_signs_cancel():
    torch.manual_seed(0)
    model, data = Conv(norm=False), images(samples=8, batch=8)
    single = elements(model, "conv1.weight", "conv2.weight")
    shares = Snip(share=True).score(Context(model, single, data=data))
    assert float(sum(s.sum() for s in shares.values())) == pytest.approx(1.0, abs=1e-5)
    raw = Snip().score(Context(model, single, data=data))
    torch.testing.assert_close(shares["conv2.weight"] * sum(s.sum() for s in raw.values()), raw["conv2.weight"])
    total, cancelled = (
        Snip(reduce=r).score(Context(model, conv_groups(norm=False), data=data)) for r in ("abs", "signed")
    )
    assert all(bool((total[n] > cancelled[n]).all()) for n in total)


def test_grasp_equals_the_difference_of_two_gradients():
    """H g along g by central differences."""
    torch.manual_seed(0)
    model, data = Attention().double().eval(), tokens(samples=6, batch=4, dtype=torch.float64)

    def gradient():
        losses = [len(y) * nn.functional.cross_entropy(model(x), y) for x, y in data]
        return torch.autograd.grad(sum(losses) / 6, model.up.weight)[0]

    g, start = gradient(), model.up.weight.detach().clone()
    around = []
    for sign in (1, -1):
        with torch.no_grad():
            model.up.weight.copy_(start + sign * 1e-4 * g)
        around.append(gradient())
    with torch.no_grad():
        model.up.weight.copy_(start)
    expected = start * (around[0] - around[1]) / 2e-4
    found = Grasp().score(Context(model, elements(model, "up.weight"), data=data))["up.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_numbers_out_of_range_are_refused():
    for make in (lambda: IntegratedGradients(steps=0), lambda: Movement(steps=0), lambda: Movement(lr=0.0)):
        with pytest.raises(RecipeError):
            make()


def test_taylor_scores_units_of_several_kinds_in_one_call():
    """Kernels of a layer with one input channel lie along one dimension, the others along two."""
    import secateur as sc

    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    )
    data = [(torch.randn(5, 1, 6, 6), torch.randint(0, 3, (5,)))]
    together = sc.score(model, criterion="taylor", granularity="kernel", data=data)
    alone = sc.score(model, criterion="taylor", granularity="kernel", data=data, protect=["0"])
    torch.testing.assert_close(together["2.weight"], alone["2.weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())
