import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from secateur.errors import InputError, UnsupportedError
from secateur.model.call import default_loss
from secateur.statistics.curvature import gauss_newton_matrix as gauss_newton
from secateur.statistics.curvature.fisher_information import fisher_diagonal
from secateur.statistics.curvature.gauss_newton_matrix import gauss_newton_diagonal, same_layer_exact
from secateur.statistics.curvature.hessian import exact_diagonal, hessian_blocks, hutchinson_diagonal, quadratic_forms
from secateur.statistics.curvature.kronecker import kronecker_factors
from secateur.statistics.gradients.per_sample import per_sample_gradients
from secateur.statistics.notes import CurvatureWarning

NETS = ["relu", "gelu", "attention"]


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def split(batch):
    x, y = batch
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def brute_hessian(model, batch, name):
    """Dense Hessian of one tensor's block by torch.autograd.functional, without the library's loss plumbing."""

    def loss_of(value):
        output = functional_call(model, {name: value.view_as(model.get_parameter(name))}, (batch[0],))
        return nn.functional.cross_entropy(output, batch[1])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss_of, model.get_parameter(name).detach().flatten())


def finite_differences(model, batch, name, step=1e-4):
    """Second differences of the loss itself, one weight at a time."""
    weight = model.get_parameter(name)
    found = torch.zeros(weight.numel(), dtype=torch.float64)
    with torch.no_grad():
        middle = default_loss(model, batch)
        for k in range(weight.numel()):
            old = weight.view(-1)[k].item()
            values = []
            for way in (step, -step):
                weight.view(-1)[k] = old + way
                values.append(default_loss(model, batch))
            weight.view(-1)[k] = old
            found[k] = (values[0] - 2 * middle + values[1]) / step**2
    return found.view_as(weight)


@pytest.mark.parametrize("net", NETS)
def test_exact_diagonal_equals_brute_force_and_finite_differences(network, net):
    model, batch = network(net)
    found = exact_diagonal(model, default_loss, split(batch), names_of(model))
    assert found.samples == 6
    for name in names_of(model):
        brute = brute_hessian(model, batch, name).diagonal().view_as(found.values[name])
        assert float((found.values[name] - brute).abs().max()) < 1e-10, name
        assert float((found.values[name] - finite_differences(model, batch, name)).abs().max()) < 1e-6, name


def brute_gauss_newton(model, batch, name):
    """J^T (diag p - p p^T) J by autograd Jacobians, sample by sample."""
    weight = model.get_parameter(name).detach()
    total = torch.zeros(weight.numel(), dtype=torch.float64)
    for x in batch[0]:

        def output(value, x=x):
            return functional_call(model, {name: value.view_as(weight)}, (x[None],))[0]

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            jacobian = torch.autograd.functional.jacobian(output, weight.flatten())
        p = output(weight).softmax(0).detach()
        total += torch.einsum("ci,cd,di->i", jacobian, torch.diag(p) - torch.outer(p, p), jacobian)
    return (total / len(batch[0])).view_as(weight)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("route", ["layers", "vmap", "loop"])
def test_gauss_newton_equals_brute_force_on_every_route(network, net, route, monkeypatch):
    model, batch = network(net)
    if route != "layers":
        monkeypatch.setattr(gauss_newton, "pull_back", lambda *_: None)
        monkeypatch.setattr(gauss_newton, "batching_pays", lambda _: route == "vmap")
    found = gauss_newton_diagonal(model, default_loss, split(batch), names_of(model))
    for name in names_of(model):
        brute = brute_gauss_newton(model, batch, name)
        assert float((found.values[name] - brute).abs().max()) < 1e-11, name


def test_gauss_newton_is_the_hessian_for_relu_and_not_for_gelu(network):
    for net, same in (("relu", True), ("gelu", False)):
        model, batch = network(net)
        hessian = exact_diagonal(model, default_loss, split(batch), ["0.weight"]).values["0.weight"]
        ggn = gauss_newton_diagonal(model, default_loss, split(batch), ["0.weight"]).values["0.weight"]
        apart = float((hessian - ggn).abs().max() / ggn.abs().max())
        assert (apart < 1e-10) if same else (apart > 0.05)


def test_probe_finds_where_the_shortcut_holds(network):
    model, batch = network("relu")
    assert same_layer_exact(model, default_loss, batch, names_of(model)) == frozenset(names_of(model))
    model, batch = network("gelu")
    assert same_layer_exact(model, default_loss, batch, names_of(model)) == {"7.weight", "7.bias"}
    model, batch = network("attention")
    assert same_layer_exact(model, default_loss, batch, names_of(model)) == {"head.weight", "head.bias"}


def test_probe_sees_shared_weights_and_penalties():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()).relu())

    torch.manual_seed(0)
    model = Twice().double()
    batch = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    passed = same_layer_exact(model, default_loss, batch, names_of(model))
    assert "a.weight" not in passed
    assert {"b.weight", "b.bias"} <= passed

    def penalised(m, b):
        return default_loss(m, b) + m.b.weight.square().sum()

    assert same_layer_exact(model, penalised, batch, names_of(model)) == frozenset()
    with pytest.raises(UnsupportedError, match="another way"):
        gauss_newton_diagonal(model, penalised, [batch], names_of(model))


def test_gauss_newton_of_squared_error_and_of_a_loss_that_is_not_convex():
    model = nn.Linear(2, 2, bias=False).double()
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    batch = x, torch.zeros(2, 2, dtype=torch.float64)
    squared = gauss_newton_diagonal(model, default_loss, [batch], ["weight"]).values["weight"]
    torch.testing.assert_close(squared, x.square().mean(0).expand(2, 2))  # mean over 2 outputs: factor 2 / 2

    def saddle(m, b):
        z = m(b[0])
        return (z[:, 0].square() - z[:, 1].square()).mean() / 2

    bent = gauss_newton_diagonal(model, saddle, [batch], ["weight"]).values["weight"]
    torch.testing.assert_close(bent, x.square().mean(0) * torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    drawn = gauss_newton_diagonal(model, saddle, [batch], ["weight"], draws=1)
    torch.testing.assert_close(drawn.values["weight"], bent)  # one root of each sign: nothing is mixed


def test_random_draws_tend_to_the_exact_diagonal(network):
    model, batch = network("attention")
    names = ["qkv.weight", "head.weight"]
    exact = gauss_newton_diagonal(model, default_loss, [batch], names).values
    many = [tuple(t.repeat(100, *[1] * (t.dim() - 1)) for t in batch)]  # samples draw independently
    drawn = gauss_newton_diagonal(model, default_loss, many, names, draws=4, seed=1)
    sampled = fisher_diagonal(model, default_loss, many, names, labels="model", draws=4, seed=1).values
    for name in names:
        scale = float(exact[name].abs().max())
        assert float((drawn.values[name] - exact[name]).abs().max()) < 0.15 * scale
        assert float((sampled[name] - exact[name]).abs().max()) < 0.15 * scale
    assert drawn.probes == 4


def test_hutchinson_error_bars_cover_the_truth_and_seeds_repeat(network):
    model, batch = network("gelu")
    names = names_of(model)
    exact = exact_diagonal(model, default_loss, split(batch), names).values
    found = hutchinson_diagonal(model, default_loss, split(batch), names, probes=40, seed=3)
    again = hutchinson_diagonal(model, default_loss, split(batch), names, probes=40, seed=3)
    assert all(torch.equal(found.values[n], again.values[n]) for n in names)
    score = torch.cat([((found.values[n] - exact[n]) / found.error[n].clamp(min=1e-9)).flatten() for n in names])
    assert 0.5 < float(score.square().mean().sqrt()) < 2.0  # errors are of the size that the bars claim
    assert 0 < found.relative_error < 5


def test_blocks_and_quadratic_forms_equal_the_dense_hessian(network):
    model, batch = network("attention")
    dense = brute_hessian(model, batch, "up.weight")
    index = torch.tensor([3, 0, 11])
    (block,) = hessian_blocks(model, default_loss, split(batch), [("up.weight", index)])
    torch.testing.assert_close(block, dense[index][:, index], rtol=0, atol=1e-12)
    vector = torch.randn(5, 4, dtype=torch.float64)
    (form,) = quadratic_forms(
        model, default_loss, split(batch), lambda _: {"up.weight": vector}, 1, names=["up.weight"]
    )
    assert math.isclose(float(form), float(vector.flatten() @ dense @ vector.flatten()), rel_tol=1e-9)


def test_empirical_fisher_is_of_samples_not_of_batches(network):
    model, batch = network("relu")
    names = ["0.weight", "7.weight"]
    rows = per_sample_gradients(model, default_loss, batch, names, way="loop")
    for data in ([batch], split(batch), [(x[None], y[None]) for x, y in zip(*batch, strict=True)]):
        found = fisher_diagonal(model, default_loss, data, names)
        for name in names:
            torch.testing.assert_close(found.values[name], rows[name].square().mean(0), rtol=1e-9, atol=1e-14)


def test_model_fisher_of_squared_error_and_dense_predictions_is_gauss_newton():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 1, bias=False).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    for target in (torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(3, (4, 5))):
        exact = gauss_newton_diagonal(model, default_loss, [(x, target)], ["weight"]).values["weight"]
        many = tuple(t.repeat(150, *[1] * (t.dim() - 1)) for t in (x, target))
        drawn = fisher_diagonal(model, default_loss, [many], ["weight"], labels="model", draws=10, seed=0).values[
            "weight"
        ]
        assert float(((drawn - exact) / exact).abs().max()) < 0.15


def test_model_fisher_refuses_losses_that_are_no_likelihood(network):
    model, batch = network("relu")

    def smoothed(m, b):
        return nn.functional.cross_entropy(m(b[0]), b[1], label_smoothing=0.2)

    with pytest.raises(UnsupportedError, match="not the cross entropy"):
        fisher_diagonal(model, smoothed, [batch], ["0.weight"], labels="model")

    def absolute(m, b):
        return (m(b[0]) - b[1]).abs().mean()

    with pytest.raises(UnsupportedError, match="not the squared error"):
        fisher_diagonal(model, absolute, [(batch[0], torch.zeros(6, 3).double())], ["0.weight"], labels="model")
    with pytest.raises(UnsupportedError, match="no target"):
        fisher_diagonal(model, lambda m, b: m(b).mean(), [batch[0]], ["0.weight"], labels="model")


def test_interpolation_is_said_aloud():
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[50.0, 0.0], [0.0, 50.0]]))
    right = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.warns(CurvatureWarning, match="right on 2 of 2"):
        fisher_diagonal(model, default_loss, [right], ["weight"])
    fitted = torch.eye(2, dtype=torch.float64), 50 * torch.eye(2, dtype=torch.float64)
    with pytest.warns(CurvatureWarning, match="every per-sample gradient is zero"):
        found = fisher_diagonal(model, default_loss, [fitted], ["weight"])
    assert float(found.values["weight"].abs().max()) == 0.0
    wrong = torch.eye(2, dtype=torch.float64), torch.tensor([1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher_diagonal(model, default_loss, [wrong], ["weight"])


def test_kronecker_factors_of_two_linear_layers_are_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    found = kronecker_factors(model, default_loss, [(x[:3], y[:3]), (x[3:], y[3:])], names_of(model))
    for name, factors in found.items():
        hessian = brute_block(model, (x, y), name)
        a = factors.a_GJJ[0, :-1, :-1]  # without the row of the bias
        torch.testing.assert_close(torch.kron(factors.s_GOO[0], a), hessian, rtol=1e-9, atol=1e-12)


def brute_block(model, batch, name):
    def loss_of(value):
        output = functional_call(model, {name: value.view_as(model.get_parameter(name))}, (batch[0],))
        return nn.functional.mse_loss(output, batch[1])

    return torch.autograd.functional.hessian(loss_of, model.get_parameter(name).detach().flatten())


def test_kronecker_factors_of_convolutions_by_hand(network):
    model, (x, y) = network("relu")
    (factors,) = kronecker_factors(model, default_loss, split((x, y)), ["0.weight"], slopes="data").values()
    patches = nn.functional.unfold(x, 3, padding=1)  # [samples, 18, 16 positions]
    a = torch.einsum("bjp,bkp->jk", patches, patches) / (6 * 16)
    torch.testing.assert_close(factors.a_GJJ[0], a, rtol=1e-9, atol=1e-12)
    z = model[0](x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(6 * nn.functional.cross_entropy(model[1:](z), y), z)
    s = torch.einsum("bohw,bqhw->oq", slope, slope) / 6
    torch.testing.assert_close(factors.s_GOO[0], s, rtol=1e-9, atol=1e-12)


def test_kronecker_spectrum_is_the_fisher_diagonal_in_the_eigenbasis(network):
    model, (x, y) = network("relu")
    (factors,) = kronecker_factors(
        model, default_loss, split((x, y)), ["7.weight"], slopes="data", spectrum=True
    ).values()
    qa, qs = factors.eigenvectors()
    rows = per_sample_gradients(model, default_loss, (x, y), ["7.weight"], way="loop")["7.weight"]
    rotated = torch.einsum("po,noj,jq->npq", qs[0].T, rows, qa[0]).square().mean(0)
    torch.testing.assert_close(factors.spectrum_GOJ[0], rotated, rtol=1e-9, atol=1e-14)


def test_kronecker_refuses_reused_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(self.a(x).relu())

    with pytest.raises(UnsupportedError, match="more than once"):
        kronecker_factors(Twice(), default_loss, [(torch.randn(2, 3), torch.tensor([0, 1]))], ["a.weight"])


def test_losses_that_gauss_newton_cannot_see(network):
    model, batch = network("relu")
    with pytest.raises(UnsupportedError, match="2 times"):
        gauss_newton_diagonal(model, lambda m, b: default_loss(m, b) + m(b[0]).mean(), [batch], ["0.weight"])
    with pytest.raises(InputError, match="no batch"):
        gauss_newton_diagonal(model, default_loss, [], ["0.weight"])
