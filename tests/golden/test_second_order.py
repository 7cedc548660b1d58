"""Golden values of the diagonal criteria and K-FAC: closed forms, hand calculations, true loss changes."""

import itertools

import pytest
import torch
from torch import nn

from secateur.criteria.base import Context
from secateur.criteria.curvature.fisher import Fisher
from secateur.criteria.curvature.gauss_newton import GaussNewton
from secateur.criteria.curvature.kfac import KroneckerCurvature
from secateur.criteria.curvature.obd import OptimalBrainDamage
from secateur.errors import RecipeError
from secateur.model.call import default_loss
from secateur.recover import finetune
from secateur.statistics.curvature import hessian
from secateur.statistics.curvature.hessian import exact_diagonal, hutchinson_diagonal
from secateur.statistics.gradients.functional import set_aside
from secateur.statistics.gradients.per_sample import batch_gradients, per_sample_gradients
from secateur.statistics.notes import CurvatureWarning
from secateur.types import Group, Span

H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=torch.float64)
CENTRE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
AWAY = torch.tensor([0.8, -1.5, 0.9], dtype=torch.float64)


class Bowl(nn.Module):
    """A quadratic loss in one vector of weights."""

    def __init__(self, w, matrix=H, centre=CENTRE):
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.matrix, self.centre = matrix, centre

    def forward(self, batch):
        apart = self.w - self.centre
        return apart @ self.matrix @ apart / 2 + 0 * batch.sum()


def loss_of(model, batch):
    return model(batch)


def elements(model, names=None):
    names = names or [n for n, p in model.named_parameters() if p.dim() > 1]
    return [Group(n, "element", tuple(model.get_parameter(n).shape), (Span(n, None, "self"),)) for n in names]


def context_of(model, groups=None, data=None, loss=default_loss, **options):
    return Context(model, groups or elements(model), data=data, loss=loss, **options)


def bowl(w, groups=None, **options):
    model = Bowl(w, **options)
    return context_of(model, groups or elements(model, ["w"]), [torch.zeros(2, dtype=w.dtype)], loss_of)


def true_changes(context, sets):
    model = context.model
    with torch.no_grad():
        before, kept = context.loss(model, context.data[0]).item(), model.w.clone()
        found = []
        for some in sets:
            model.w[list(some)] = 0.0
            found.append(context.loss(model, context.data[0]).item() - before)
            model.w.copy_(kept)
    return torch.tensor(found, dtype=torch.float64)


def test_obd_at_the_minimum_is_the_true_change():
    context = bowl(CENTRE)
    expected = torch.tensor([2.0, 6.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(OptimalBrainDamage().contributions(context)["w"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(true_changes(context, [[0], [1], [2]]), expected, rtol=0, atol=1e-12)


def test_obd_away_from_the_minimum_needs_the_slope():
    context = bowl(AWAY)
    with_slope = OptimalBrainDamage(first_order=True).contributions(context)["w"]
    expected = torch.tensor([1.52, 5.625, -0.135], dtype=torch.float64)
    torch.testing.assert_close(with_slope, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(true_changes(context, [[0], [1], [2]]), expected, rtol=0, atol=1e-12)
    slope = with_slope - OptimalBrainDamage().contributions(context)["w"]
    torch.testing.assert_close(slope, torch.tensor([0.24, 2.25, -0.945], dtype=torch.float64))


@pytest.mark.parametrize(("negative", "last"), [("keep", -0.135), ("clip", 0.0), ("abs", 0.135)])
def test_negative_saliency_is_treated_as_asked(negative, last):
    score = OptimalBrainDamage(first_order=True, negative=negative).score(bowl(AWAY))["w"]
    torch.testing.assert_close(score, torch.tensor([1.52, 5.625, last]))


def test_joint_obd_is_the_true_change_of_a_whole_unit():
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    options = {"matrix": root @ root.T, "centre": torch.randn(6, dtype=torch.float64)}
    units = Group("units", "vector", (2,), (Span("w", torch.tensor([0, 1, -1, 0, 1, 0]), "self"),))
    for w, first in ((options["centre"], False), (torch.randn(6, dtype=torch.float64), True)):
        context = bowl(w, [units], **options)
        true = true_changes(context, [[0, 3, 5], [1, 4]])
        joint = OptimalBrainDamage(joint=True, first_order=first)
        torch.testing.assert_close(joint._score(context)["units"], true, rtol=1e-10, atol=1e-10)
        summed = OptimalBrainDamage(first_order=first).score(context)["units"].double()
        assert float((summed - true).abs().max()) > 1e-3  # the diagonal leaves the cross terms out


def test_joint_obd_of_many_units_is_refused():
    with pytest.raises(RecipeError, match="more than 2"):
        OptimalBrainDamage(joint=True, unit_limit=2).score(bowl(CENTRE))


def test_larger_weight_goes_where_curvature_is_small():
    w, matrix = torch.tensor([0.5, 0.3]), torch.diag(torch.tensor([0.1, 2.0]))
    score = OptimalBrainDamage().score(bowl(w, matrix=matrix, centre=w))["w"]
    torch.testing.assert_close(score, torch.tensor([0.0125, 0.09]))


def test_hutchinson_over_all_signs_has_the_textbook_mean_and_variance(monkeypatch):
    every = [torch.tensor(s, dtype=torch.float64) for s in itertools.product([-1.0, 1.0], repeat=3)]
    drawn = iter(every)
    monkeypatch.setattr(hessian, "signs", lambda *_: next(drawn))
    model = Bowl(CENTRE)
    found = hutchinson_diagonal(model, loss_of, [torch.zeros(1)], ["w"], probes=8)
    torch.testing.assert_close(found.values["w"], H.diagonal())
    variance = found.error["w"].square() * 8 * 7 / 8  # of one draw, over the whole population
    torch.testing.assert_close(variance, torch.tensor([1.0, 1.25, 0.25], dtype=torch.float64))


def test_per_sample_fisher_and_batch_squares_differ_as_predicted():
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    rows = per_sample_gradients(model, default_loss, (x, y), ["weight"])["weight"]
    fisher, mean = rows.square().mean(0), rows.mean(0)
    pairs = list(itertools.product(range(5), repeat=3))  # every batch of 3, drawn with replacement
    squares = sum(
        next(batch_gradients(model, default_loss, [(x[list(p)], y[list(p)])], ["weight"])).gradients["weight"] ** 2
        for p in pairs
    ) / len(pairs)
    torch.testing.assert_close(squares, fisher / 3 + (1 - 1 / 3) * mean.square())
    ratio = squares / fisher
    assert float(ratio.max() / ratio.min()) > 1.05  # no constant factor: rankings change
    context = context_of(model, data=[(x[:2], y[:2]), (x[2:], y[2:])])
    expected = fisher * model.weight.detach().square() / 2
    torch.testing.assert_close(Fisher().contributions(context)["weight"], expected)


def test_linear_layer_kfac_gauss_newton_and_hessian_agree():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    data = [(torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64))]
    x = torch.cat([data[0][0], torch.ones(9, 1, dtype=torch.float64)], 1)
    second = x.T @ x / 9 * 2 / 3  # mse: mean over 3 outputs
    w = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    rows = Span("weight", torch.arange(3)[:, None], "out"), Span("bias", torch.arange(3), "bias")
    context = context_of(model, [Group("neurons", "channel", (3,), rows)], data)
    expected = ((w @ second) * w).sum(1) / 2
    for criterion in (
        KroneckerCurvature(),
        OptimalBrainDamage(joint=True),
        KroneckerCurvature(form="ekfac"),
    ):
        torch.testing.assert_close(criterion._score(context)["neurons"], expected, rtol=1e-8, atol=1e-10)
    single = context_of(model, elements(model, ["weight"]), data)
    diagonal = second.diagonal()[:4] * w[:, :4].square() / 2
    for criterion in (KroneckerCurvature(), GaussNewton(), OptimalBrainDamage()):
        torch.testing.assert_close(criterion.score(single)["weight"].double(), diagonal, rtol=1e-5, atol=1e-7)


def test_kfac_obs_equals_the_dense_inverse_of_the_kronecker_product():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 4, 2, groups=2, bias=False).double()
    data = [(torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randn(5, 4, 3, 3, dtype=torch.float64))]
    index = {
        "filters": torch.arange(4).view(4, 1, 1, 1),
        "kernels": torch.arange(4).view(4, 1, 1, 1),
        "columns": torch.arange(2).view(1, 1, 1, 2),
        "ragged": torch.tensor([0, 1, 1, 0, 2, 2, 0, 1, 0, 0, 2, 1, 1, 0, 2, 2]).view(4, 1, 2, 2),
    }
    groups = [Group(n, "vector", (int(i.max()) + 1,), (Span("weight", i, "self"),)) for n, i in index.items()]
    context = context_of(model, [*groups, *elements(model, ["weight"])], data)
    w = model.weight.detach().view(2, 2 * 4)
    for form in ("obd", "obs"):
        criterion = KroneckerCurvature(form=form, damping=1e-4)
        scores = criterion._score(context)
        (factors,) = criterion.factors(context).values()
        dense = []
        for g in range(2):
            a, s = factors.a_GJJ[g], factors.s_GOO[g]
            if form == "obs":
                mean_a, mean_s = (f.diagonal(dim1=1, dim2=2).mean() for f in (factors.a_GJJ, factors.s_GOO))
                a, s = a + 1e-2 * mean_a * torch.eye(4), s + 1e-2 * mean_s * torch.eye(2)
            dense.append(torch.kron(s, a))
        for name, i in {**index, "weight": torch.arange(16).view(4, 1, 2, 2)}.items():
            unit = i.expand(4, 1, 2, 2).reshape(2, 8)
            for number in range(int(i.max()) + 1):
                expected = 0.0
                for g in range(2):
                    q = (unit[g] == number).nonzero()[:, 0]
                    if len(q) == 0:
                        continue
                    block = dense[g][q][:, q]
                    if form == "obs":
                        block = torch.linalg.inv(torch.linalg.inv(dense[g])[q][:, q])
                    expected += float(w[g, q] @ block @ w[g, q]) / 2
                assert float(scores[name].flatten()[number]) == pytest.approx(expected, rel=1e-8)


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    x = torch.randn(120, 6)
    y = (x[:, :3] + 0.5 * torch.randn(120, 3)).argmax(1)
    finetune(model, [(x, y)], optimizer={"name": "adam", "lr": 0.02}, steps=60)
    return model, [(x[i : i + 40], y[i : i + 40]) for i in range(0, 120, 40)]


@pytest.mark.parametrize("kind", ["element", "rows"])
def test_automatic_damping_of_kfac_is_the_one_whose_removals_cost_least(kind):
    model, data = trained()
    rows = [Group(n, "vector", (r,), (Span(n, torch.arange(r).view(-1, 1), "self"),)) for n, r in (("0.weight", 12),)]
    groups = elements(model) if kind == "element" else rows
    # Every fifth sample is held out, spread over all of them: 24 of 120.
    aside = set(torch.linspace(0, 119, 24, dtype=torch.float64).round().long().tolist())
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    rest = [i for i in range(120) if i not in aside]
    held = sorted(aside)
    found, costs = {}, {}
    for damping in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        criterion = KroneckerCurvature(form="obs", damping=damping)
        found[damping] = criterion.score(context_of(model, groups, [(x[rest], y[rest])]))
        worth = sorted((float(v), g.name, i) for g in groups for i, v in enumerate(found[damping][g.name].flatten()))
        costs[damping] = 0.0
        for fraction in (0.25, 0.5):
            copy = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
            copy.load_state_dict(model.state_dict())
            with torch.no_grad():
                for _, name, i in worth[: round(fraction * len(worth))]:
                    weight = copy.get_parameter(name)
                    (weight.view(-1) if kind == "element" else weight)[i] = 0.0
                costs[damping] += float(nn.functional.cross_entropy(copy(x[held]), y[held]))
    automatic = KroneckerCurvature(form="obs").score(context_of(model, groups, data))
    assert len({round(cost, 5) for cost in costs.values()}) > 1
    best = min(reversed(list(costs)), key=lambda damping: round(costs[damping], 5))
    for name, score in automatic.items():
        torch.testing.assert_close(score, found[best][name], rtol=1e-4, atol=1e-9)


def test_too_few_samples_to_choose_a_damping_are_said_aloud():
    model, data = trained()
    few = [(data[0][0][:4], data[0][1][:4])]
    with pytest.warns(CurvatureWarning, match="too few samples"):
        automatic = KroneckerCurvature(form="obs").score(context_of(model, data=few))
    fixed = KroneckerCurvature(form="obs", damping=1e-3).score(context_of(model, data=few))
    for name, score in automatic.items():
        torch.testing.assert_close(score, fixed[name])


@pytest.mark.parametrize("sizes", [[40, 40], [7, 3, 30], [5], [1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("held", [0, 3, 100])
def test_samples_are_set_aside_evenly_whatever_the_batches(sizes, held):
    total = sum(sizes)
    whole = torch.arange(total).float()[:, None]
    batches = [(part, part[:, 0].long()) for part in torch.split(whole, sizes)]
    rest, kept = set_aside(nn.Linear(1, 1), batches, held)
    numbers = [int(v) for x, _ in rest for v in x[:, 0]]
    aside = [int(v) for (x, _), size in kept for v in x[:, 0] if len(x) == size]
    assert sorted(numbers + aside) == list(range(total))
    assert len(aside) == min(held, total // 5)
    assert all(torch.equal(x[:, 0].long(), y) for x, y in [*rest, *(batch for batch, _ in kept)])
    if len(aside) > 1:
        gaps = [b - a for a, b in itertools.pairwise(aside)]
        assert max(gaps) - min(gaps) <= 1


def test_kfac_of_unknown_layers_is_refused():
    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.Flatten(), nn.Linear(6, 2))
    data = [(torch.randn(3, 2, 3), torch.tensor([0, 1, 0]))]
    with pytest.raises(RecipeError, match=r"not the one of '0.weight'"):
        KroneckerCurvature().score(context_of(model, data=data))


def test_regression_where_fisher_ranks_the_other_way_round():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)

    def half(m, batch):
        return default_loss(m, batch) / 2

    context = context_of(model, data=[(x, y)], loss=half)
    obd = OptimalBrainDamage().score(context)["weight"]
    fisher = Fisher().score(context)["weight"]
    torch.testing.assert_close(obd, torch.tensor([[0.970, 0.393]]), rtol=0, atol=5e-4)
    torch.testing.assert_close(fisher, torch.tensor([[0.201, 0.648]]), rtol=0, atol=5e-4)


def test_hessian_of_cross_entropy_in_the_logits():
    model = nn.Linear(1, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.7], [0.2], [0.1]], dtype=torch.float64).log())
    data = [(torch.ones(1, 1, dtype=torch.float64), torch.tensor([1]))]
    expected = torch.tensor([[0.21], [0.16], [0.09]], dtype=torch.float64)
    context = context_of(model, data=data)
    for method in ("auto", "exact", "gauss-newton"):
        found = OptimalBrainDamage(method=method).diagonal(context)
        torch.testing.assert_close(found.values["weight"], expected)
    assert OptimalBrainDamage().diagonal(context).method == {"weight": "gauss-newton"}


@pytest.mark.parametrize(("activation", "same"), [(nn.ReLU, True), (nn.GELU, False)])
def test_auto_takes_the_shortcut_exactly_where_it_holds(activation, same):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).double()
    data = [(torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3)]
    context = context_of(model, data=data)
    auto = OptimalBrainDamage().diagonal(context)
    assert auto.method == {"0.weight": "gauss-newton" if same else "exact", "2.weight": "gauss-newton"}
    truth = exact_diagonal(model, default_loss, data, ["0.weight", "2.weight"]).values
    for name, values in truth.items():
        torch.testing.assert_close(auto.values[name], values, rtol=1e-9, atol=1e-12)
    ggn = GaussNewton().diagonal(context).values["0.weight"]
    assert bool(torch.allclose(ggn, truth["0.weight"], rtol=1e-9, atol=1e-12)) is same
    big = OptimalBrainDamage(exact_limit=3, probes=600).diagonal(context)
    assert big.method["0.weight"] == ("gauss-newton" if same else "hutchinson")
    assert set(big.error) == (set() if same else {"0.weight"})


def test_fisher_joint_is_the_squared_gate_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    spans = (Span("0.weight", torch.arange(3).view(3, 1, 1, 1), "out"), Span("0.bias", torch.arange(3), "bias"))
    context = context_of(model, [Group("c", "channel", (3,), spans)], [(x[:2], y[:2]), (x[2:], y[2:])])
    gate = torch.ones(3, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(3, dtype=torch.float64)
    for one, label in zip(x, y, strict=True):
        z = model[1:](model[0](one[None]) * gate[:, None, None])
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(z, label[None]), gate)
        expected += slope.square() / 10
    torch.testing.assert_close(Fisher(joint=True)._score(context)["c"], expected, rtol=1e-9, atol=1e-12)


def test_wrong_options_are_refused():
    for build in (
        lambda: OptimalBrainDamage(method="newton"),
        lambda: OptimalBrainDamage(negative="shift"),
        lambda: OptimalBrainDamage(probes=1),
        lambda: GaussNewton(draws=0),
        lambda: Fisher(labels="true"),
        lambda: Fisher(draws=0),
        lambda: KroneckerCurvature(form="full"),
        lambda: KroneckerCurvature(damping=0.0),
        lambda: KroneckerCurvature(coupled="some"),
    ):
        with pytest.raises(RecipeError):
            build()
