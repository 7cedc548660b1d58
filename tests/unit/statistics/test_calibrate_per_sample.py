import copy

import pytest
import torch
from torch import nn

from secateur.errors import InputError, NonFiniteError
from secateur.model.call import default_loss
from secateur.statistics.gradients.functional import samples_of
from secateur.statistics.gradients.per_sample import (
    batch_gradients,
    hessian_operator,
    hessian_vector_product,
    iterate_per_sample_gradients,
    per_sample_gradients,
)

NETS = ["relu", "gelu", "attention"]


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def plain_backward(model, batch, number):
    """The oracle: ``loss.backward()`` on a batch of one, without any of the library."""
    model.zero_grad()
    default_loss(model, (batch[0][number : number + 1], batch[1][number : number + 1])).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("way", ["auto", "vmap", "loop"])
def test_every_way_equals_plain_backward_passes(network, net, way):
    model, batch = network(net)
    found = per_sample_gradients(model, default_loss, batch, names_of(model), way=way, chunk=4)
    for number in range(6):
        for name, exact in plain_backward(model, batch, number).items():
            torch.testing.assert_close(found[name][number], exact, rtol=1e-9, atol=1e-12)


def everything():
    """Every layer that can be read off, with the options that change the arithmetic."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", dilation=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 2, dilation=2, padding=1, bias=False),
        nn.Flatten(2),
        nn.Conv1d(2, 3, 2, stride=2),
        nn.LayerNorm(2),
        nn.Flatten(),
        nn.Linear(6, 4),
        nn.LayerNorm(4),
        nn.Linear(4, 3),
    )


def test_layers_are_read_off_and_equal_the_loop():
    torch.manual_seed(1)
    model = everything().double().eval()
    batch = torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    wide = model[:9](batch[0]).shape[-1]
    model[9], model[11] = nn.LayerNorm(wide).double(), nn.Linear(3 * wide, 4).double()
    read = per_sample_gradients(model, default_loss, batch, names_of(model), way="layers")
    loop = per_sample_gradients(model, default_loss, batch, names_of(model), way="loop")
    for name in loop:
        torch.testing.assert_close(read[name], loop[name], rtol=1e-9, atol=1e-12)


class Sly(nn.Module):
    """Layers that cannot be read off: used twice, positions before samples, weight used without its layer."""

    def __init__(self):
        super().__init__()
        self.twice, self.turned, self.bare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.twice(self.twice(x).tanh()).tanh()
        x = self.turned(x.transpose(0, 1)).transpose(0, 1).mean(1)
        return nn.functional.linear(x, self.bare.weight)


def test_layers_that_mislead_are_found_out():
    torch.manual_seed(2)
    model = Sly().double()
    batch = torch.randn(3, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])  # as many positions as samples
    names = ["twice.weight", "turned.weight", "bare.weight"]
    found = per_sample_gradients(model, default_loss, batch, names)
    for number in range(3):
        single = samples_of(batch, 3, slice(number, number + 1))
        exact = torch.autograd.grad(default_loss(model, single), [model.get_parameter(n) for n in names])
        for name, gradient in zip(names, exact, strict=True):
            torch.testing.assert_close(found[name][number], gradient, rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match="cannot be read off"):
        per_sample_gradients(model, default_loss, batch, ["turned.weight"], way="layers")


def test_chunks_make_no_difference_and_model_is_untouched(network):
    model, batch = network("gelu")
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = per_sample_gradients(model, default_loss, batch, names_of(model))
    parts = list(iterate_per_sample_gradients(model, default_loss, batch, names_of(model), chunk=2))
    assert [len(part["0.weight"]) for part in parts] == [2, 2, 2]
    for name in whole:
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-9, atol=1e-13)
    assert whole["0.weight"].abs().max() > 0  # frozen parameters have gradients too
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_batch_gradients_weigh_to_the_gradient_of_all(network):
    model, (x, y) = network("relu")
    parts = list(batch_gradients(model, default_loss, [(x[:4], y[:4]), (x[4:], y[4:])], names_of(model)))
    assert [part.samples for part in parts] == [4, 2]
    default_loss(model, (x, y)).backward()
    for name, p in model.named_parameters():
        mean = sum(part.gradients[name] * part.samples for part in parts) / 6
        torch.testing.assert_close(mean, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
def test_hessian_vector_product_equals_autograd_hessian_and_differences(network, net):
    model, batch = network(net)
    name = {"relu": "4.bias", "gelu": "0.bias", "attention": "norm.weight"}[net]
    value = model.get_parameter(name).detach()

    def loss_of(v):
        return torch.func.functional_call(_Loss(model), {f"model.{name}": v}, (batch,))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        brute = torch.autograd.functional.hessian(loss_of, value)
    eye = torch.eye(value.numel(), dtype=torch.float64)
    rows = hessian_vector_product(model, default_loss, batch, [name], {name: eye})[name]
    torch.testing.assert_close(rows, brute, rtol=1e-9, atol=1e-12)
    step = 1e-5
    ahead, behind = (
        next(batch_gradients(_moved(model, name, s), default_loss, [batch], [name])).gradients[name]
        for s in (step, -step)
    )
    difference = (ahead - behind) / (2 * step)  # along the first coordinate
    torch.testing.assert_close(rows[0], difference, rtol=0, atol=1e-6)


class _Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return default_loss(self.model, batch)


def _moved(model, name, step):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name)[0] += step
    return other


def test_many_vectors_at_once_equal_one_at_a_time_across_tensors(network):
    model, batch = network("attention")
    names = names_of(model)
    torch.manual_seed(3)
    vectors = {n: torch.randn(3, *p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    product = hessian_operator(model, default_loss, batch, names)
    many = product(vectors)
    for k in range(3):
        one = product({n: v[k] for n, v in vectors.items()}, only=["up.weight"])
        assert list(one) == ["up.weight"]
        torch.testing.assert_close(many["up.weight"][k], one["up.weight"], rtol=1e-9, atol=1e-12)


def test_linear_loss_has_zero_hessian_and_unused_parameter_zero_gradient():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})

    def loss(m, batch):
        return m["used"](batch).mean()

    x = torch.ones(3, 2)
    names = ["used.weight", "idle.weight"]
    found = per_sample_gradients(model, loss, x, names)
    assert torch.equal(found["idle.weight"], torch.zeros(3, 1, 2))
    assert torch.equal(found["used.weight"], torch.ones(3, 1, 2))
    product = hessian_vector_product(model, loss, x, names, {"used.weight": torch.ones(2, 1, 2)})
    assert all(torch.equal(p, torch.zeros(2, 1, 2)) for p in product.values())


def test_errors_say_what_is_wrong(network):
    model, batch = network("relu")
    with pytest.raises(InputError, match=r"no floating-point parameter"):
        per_sample_gradients(model, default_loss, batch, ["nothing"])
    with pytest.raises(InputError, match="not a scalar"):
        per_sample_gradients(model, lambda m, b: m(b[0]), batch, ["0.weight"])
    with pytest.raises(InputError, match="no batch"):
        next(batch_gradients(model, default_loss, [], ["0.weight"]))
    with pytest.raises(NonFiniteError, match="loss is"):
        per_sample_gradients(model, lambda m, b: m(b[0]).sum() * float("nan"), batch, ["0.weight"])
    with pytest.raises(NonFiniteError, match="batch 1"):
        list(batch_gradients(model, _second_is_inf(), [batch, batch], ["0.weight"]))


def _second_is_inf():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return default_loss(model, batch) * (1.0 if len(calls) == 1 else float("inf"))

    return loss
