"""Golden values of Optimal Brain Surgeon: closed forms, constrained optima, and a real small network."""

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur.criteria.base import Context
from secateur.criteria.curvature.fisher import Fisher
from secateur.criteria.curvature.kfac import KroneckerCurvature
from secateur.criteria.curvature.obd import OptimalBrainDamage
from secateur.criteria.curvature.obs import OptimalBrainSurgeon
from secateur.criteria.weights.magnitude import Magnitude
from secateur.errors import InputError, RecipeError
from secateur.model.call import default_loss
from secateur.statistics.curvature.inverse import Blocks, LowRank, damped_cholesky
from secateur.statistics.gradients.per_sample import per_sample_gradients
from secateur.statistics.notes import CurvatureWarning
from secateur.types import Group, Span

H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=torch.float64)
CENTRE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
AWAY = torch.tensor([0.8, -1.5, 0.9], dtype=torch.float64)
EXACT = {"form": "block", "curvature": "hessian", "damping": 0.0}


class Bowl(nn.Module):
    def __init__(self, w, matrix, centre):
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.matrix, self.centre = matrix, centre

    def forward(self, batch):
        apart = self.w - self.centre
        return apart @ self.matrix @ apart / 2 + 0 * batch.sum()


def bowl(w, matrix=H, centre=CENTRE, groups=None):
    groups = groups or [Group("w", "element", tuple(w.shape), (Span("w", None, "self"),))]
    data = [torch.zeros(2, 1, dtype=torch.float64)]
    return Context(Bowl(w, matrix, centre), groups, data=data, loss=lambda m, b: m(b))


def elements(model):
    return [
        Group(n, "element", tuple(p.shape), (Span(n, None, "self"),))
        for n, p in model.named_parameters()
        if p.dim() > 1
    ]


def lowest(scores, sparsity):
    """Global selection of the lowest scores, exact count."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[torch.argsort(flat, stable=True)[: round(sparsity * len(flat))]] = False
    parts = torch.split(keep, [score.numel() for score in scores.values()])
    return {n: part.view(scores[n].shape) for n, part in zip(scores, parts, strict=True)}


def exact_scores(context, **options):
    criterion = OptimalBrainSurgeon(**EXACT, **options)
    return criterion.score_units(context, criterion.fit(context))


def test_quadratic_three_weights():
    context = bowl(CENTRE)
    expected = torch.tensor([1.826087, 5.25, 0.238636], dtype=torch.float64)
    torch.testing.assert_close(exact_scores(context)["w"], expected, rtol=0, atol=1e-6)
    keep = {"w": torch.tensor([False, True, True])}
    new = OptimalBrainSurgeon(**EXACT).update(context, keep)["w"]
    torch.testing.assert_close(new, torch.tensor([0.0, -1.652174, 0.413043], dtype=torch.float64), rtol=0, atol=1e-6)
    pair = Group("w", "vector", (2,), (Span("w", torch.tensor([0, 1, 0]), "self"),))
    both = exact_scores(bowl(CENTRE, groups=[pair]))["w"]
    assert float(both[0]) == pytest.approx(1.989583, abs=1e-6)


def test_quadratic_away_from_the_minimum():
    expected = torch.tensor([1.211087, 4.635, -0.376364], dtype=torch.float64)
    torch.testing.assert_close(exact_scores(bowl(AWAY), first_order=True)["w"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_saliency_and_update_are_the_constrained_optimum_of_a_quadratic(seed, first_order):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    matrix, centre = root @ root.T + 0.1 * torch.eye(7), torch.randn(7, generator=generator).double()
    w = torch.randn(7, generator=generator).double() if first_order else centre
    sets = [[0, 2, 6], [1], [3, 5]]
    index = torch.full((7,), -1)
    for number, some in enumerate(sets):
        index[some] = number
    context = bowl(w, matrix, centre, [Group("u", "vector", (3,), (Span("w", index, "self"),))])
    criterion = OptimalBrainSurgeon(**EXACT, first_order=first_order)
    surgery = criterion.fit(context)
    scores = criterion.score_units(context, surgery)["u"]
    before = context.loss(context.model, context.data[0]).item()
    for number, some in enumerate(sets):
        keep = {"u": torch.arange(3) != number}
        new = criterion.update(context, keep, surgery=surgery)["w"]
        rest = [k for k in range(7) if k not in some]
        best = centre.clone()
        best[some] = 0.0
        best[rest] += torch.linalg.solve(matrix[rest][:, rest], matrix[rest][:, some] @ centre[some])
        torch.testing.assert_close(new, best, rtol=1e-9, atol=1e-10)
        assert new[some].tolist() == [0.0] * len(some)
        assert not bool(torch.signbit(new[some]).any())
        after = Bowl(new, matrix, centre)(context.data[0]).item()
        assert float(scores[number]) == pytest.approx(after - before, abs=1e-10)


def test_recursion_woodbury_and_dense_inverse_agree():
    torch.manual_seed(0)
    rows, damping = torch.randn(6, 4, dtype=torch.float64), 1e-3
    dense = torch.linalg.inv(rows.T @ rows / 6 + damping * torch.eye(4, dtype=torch.float64))
    inverse = torch.eye(4, dtype=torch.float64) / damping
    for row in rows:
        pulled = inverse @ row
        inverse = inverse - torch.outer(pulled, pulled) / (6 + row @ pulled)
    scale = float(dense.abs().max())
    low, block = LowRank(rows, damping), Blocks([rows.T @ rows / 6], damping)
    for found in (
        inverse,
        torch.stack([low.solve(e) for e in torch.eye(4, dtype=torch.float64)]),
        block.inverse[0],
    ):
        assert float((found - dense).abs().max()) < 1e-12 * scale
    for curvature in (low, block):
        assert float((curvature.inverse_diagonal() - dense.diagonal()).abs().max()) < 1e-12 * scale


@pytest.mark.parametrize("number", [3, 40])
def test_sets_and_removals_equal_dense_algebra(number):
    torch.manual_seed(number)
    rows, w = torch.randn(number, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    matrix = rows.T @ rows / number + 0.01 * torch.eye(20, dtype=torch.float64)
    inverse = torch.linalg.inv(matrix)
    unit = torch.tensor([0] * 3 + [1] * 9 + [2] + [3] * 7)
    place = torch.randperm(20)
    keep = torch.rand(20) > 0.4
    for curvature in (LowRank(rows, 0.01), Blocks([rows.T @ rows / number], 0.01)):
        scores = curvature.saliency(w, place, unit, 4)
        for u in range(4):
            q = place[unit == u]
            expected = w[q] @ torch.linalg.solve(inverse[q][:, q], w[q]) / 2
            assert float(scores[u]) == pytest.approx(float(expected), rel=1e-9)
        q = ~keep
        answer = torch.linalg.solve(inverse[q][:, q], w[q])
        new, cost = curvature.remove(w, keep)
        torch.testing.assert_close(new, torch.where(keep, w - inverse[:, q] @ answer, 0.0), rtol=1e-8, atol=1e-9)
        assert cost == pytest.approx(float(w[q] @ answer) / 2, rel=1e-9)


def test_blocks_do_not_interact_and_short_ones_are_padded():
    torch.manual_seed(0)
    parts = [torch.randn(9, n, dtype=torch.float64) for n in (4, 4, 2)]
    blocks = [p.T @ p for p in parts]
    whole = Blocks([torch.block_diag(*blocks)], 0.5)
    split = Blocks(blocks, 0.5)
    w, keep = torch.randn(10, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0, 1]).bool()
    place, unit = torch.arange(10), torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 2, 1])
    torch.testing.assert_close(split.inverse_diagonal(), whole.inverse_diagonal())
    torch.testing.assert_close(split.solve(w), whole.solve(w))
    torch.testing.assert_close(split.saliency(w, place, unit, 3), whole.saliency(w, place, unit, 3))
    torch.testing.assert_close(split.remove(w, keep)[0], whole.remove(w, keep)[0])
    assert split.remove(w, keep)[1] == pytest.approx(whole.remove(w, keep)[1])


def small_net(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    x = torch.randn(60, 6, dtype=dtype)
    return model, [(x[k : k + 20], (x[k : k + 20, :3].argmax(1))) for k in (0, 20, 40)]


@pytest.mark.parametrize("form", ["low-rank", "block"])
def test_huge_damping_ranks_as_magnitude(form):
    model, data = small_net()
    context = Context(model, elements(model), data=data, loss=default_loss)
    scores = OptimalBrainSurgeon(form=form, damping=1e12).score(context)
    for name, score in scores.items():
        order = torch.argsort(score.flatten())
        assert torch.equal(order, torch.argsort(model.get_parameter(name).detach().abs().flatten()))


def test_fisher_scores_equal_the_dense_empirical_fisher_for_elements_and_coupled_units():
    model, data = small_net()
    names = ["0.weight", "0.bias", "2.weight"]
    span = (
        Span("0.weight", torch.arange(8)[:, None], "out"),
        Span("0.bias", torch.arange(8), "bias"),
        Span("2.weight", torch.arange(8)[None, :], "in"),
    )
    groups = [Group("hidden", "neuron", (8,), span)]
    context = Context(model, groups, data=data, loss=default_loss)
    batch = tuple(torch.cat(t) for t in zip(*data, strict=True))
    found = per_sample_gradients(model, default_loss, batch, names, way="loop")
    rows = torch.cat([found[n].flatten(1) for n in names], 1)
    fisher = rows.T @ rows / 60
    damping = 1e-2 * float(fisher.diagonal().mean())
    inverse = torch.linalg.inv(fisher + damping * torch.eye(len(fisher), dtype=torch.float64))
    w = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
    criterion = OptimalBrainSurgeon(damping=1e-2, gradients=60)
    surgery = criterion.fit(context)
    assert surgery.damping == pytest.approx(damping)
    scores = criterion.score_units(context, surgery)["hidden"]
    for unit in range(8):
        mine = torch.zeros(8, 8, dtype=torch.bool)
        mine[unit] = True
        q = torch.cat([mine[:, :6].flatten(), mine[:, 0], mine[:3].T.T.new_zeros(3, 8).flatten()])
        q[56:] = (torch.arange(8) == unit).repeat(3)
        expected = w[q] @ torch.linalg.solve(inverse[q][:, q], w[q]) / 2
        assert float(scores[unit]) == pytest.approx(float(expected), rel=1e-8)


def test_zero_weights_count_as_pruned_and_stay_zero():
    model, data = small_net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
    context = Context(model, elements(model), data=data, loss=default_loss)
    for form in ("low-rank", "block"):
        criterion = OptimalBrainSurgeon(form=form, damping=1e-3)
        surgery = criterion.fit(context)
        scores = {n: s.float() for n, s in criterion.score_units(context, surgery).items()}
        assert torch.equal(scores["0.weight"][:, ::2], torch.zeros(8, 3))
        new = criterion.update(context, lowest(scores, 0.5), surgery=surgery)
        assert torch.equal(new["0.weight"][:, ::2], torch.zeros(8, 3, dtype=torch.float64))
        removed = sum(int((tensor == 0).sum()) for tensor in new.values())
        assert removed == round(0.5 * (48 + 24))


def test_failed_cholesky_raises_damping_aloud_and_within_a_bound():
    indefinite = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    with pytest.warns(CurvatureWarning, match="damping was raised from 0 to"):
        factor, used = damped_cholesky(indefinite, 0.0, "a block")
    assert used > 0.5
    torch.testing.assert_close(factor @ factor.T, indefinite + used * torch.eye(2))
    assert damped_cholesky(H, 0.25, "a block")[1] == 0.25
    for hopeless in (torch.tensor([[0.0, 1e6], [1e6, 0.0]]), torch.full((2, 2), torch.nan)):
        with pytest.raises(InputError, match="cannot be factorised"):
            damped_cholesky(hopeless, 1e-3, "a block")


def test_vanished_gradients_are_said_aloud():
    model = nn.Linear(2, 1, bias=False)
    context = Context(model, elements(model), data=[torch.zeros(4, 2)], loss=lambda m, b: m(b).mean())
    with pytest.warns(CurvatureWarning, match="curvature is zero"):
        scores = OptimalBrainSurgeon(damping=1.0).score(context)["weight"]
    torch.testing.assert_close(scores, model.weight.detach().square() / 2)


def test_wrong_options_are_refused():
    for options in (
        {"form": "full"},
        {"curvature": "hessian"},
        {"gradients": 0},
        {"damping": -1.0},
        {"damping": 0.0},
        {"damping": float("nan")},
        {"coupled": "some"},
    ):
        with pytest.raises(RecipeError):
            OptimalBrainSurgeon(**options)


@pytest.fixture(scope="module")
def trained():
    """A small network trained on noisy labels, with its data: it does not fit them fully."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(600, 10)
    y = (x[:, :4] + 0.5 * x[:, 4:8] * x[:, 1:5] + 0.7 * torch.randn(600, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3, weight_decay=1e-3)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[:400]), y[:400]).backward()
        optimiser.step()
    data = [(x[k : k + 100], y[k : k + 100]) for k in range(0, 400, 100)]
    yield model.eval(), data
    torch.set_num_threads(before)


def loss_on(model, data, weights):
    with torch.no_grad():
        swapped = dict(model.named_parameters()) | weights
        return sum(
            float(nn.functional.cross_entropy(torch.func.functional_call(model, swapped, (x,)), y)) for x, y in data
        ) / len(data)


def masked(model, keep):
    return {n: model.get_parameter(n).detach() * k for n, k in keep.items()}


def rank_correlation(a, b):
    ranks = [torch.argsort(torch.argsort(t.flatten())).double() for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_scores_rank_as_true_loss_changes_do(trained):
    """The oracle: leave every weight out in turn and look at the loss."""
    model, data = trained
    context = Context(model, elements(model), data=data, loss=default_loss)
    base = loss_on(model, data, {})
    true = []
    for group in context.groups:
        weight = model.get_parameter(group.name).detach()
        for k in range(weight.numel()):
            without = weight.clone()
            without.view(-1)[k] = 0.0
            true.append(loss_on(model, data, {group.name: without}) - base)
    true = torch.tensor(true)

    def fidelity(criterion):
        scores = criterion.score(context)
        return rank_correlation(torch.cat([scores[g.name].flatten() for g in context.groups]), true)

    magnitude = fidelity(Magnitude())
    found = {
        "obd": fidelity(OptimalBrainDamage()),
        "obd with slope": fidelity(OptimalBrainDamage(first_order=True)),
        "fisher": fidelity(Fisher()),
        "kfac": fidelity(KroneckerCurvature()),
        "obs": fidelity(OptimalBrainSurgeon()),
    }
    assert all(value > magnitude for value in found.values()), (magnitude, found)
    assert found["obd with slope"] > 0.95
    assert found["obd"] > found["fisher"] > magnitude


def in_steps(criterion, context, sparsity, steps):
    """Masks and new weights when scores, inverse and weights are renewed between equal steps."""
    here = replace(context, model=copy.deepcopy(context.model))
    live, keep = dict(here.model.named_parameters()), {}
    for step in range(1, steps + 1):
        surgery = criterion.fit(here)
        scores = criterion.score_units(here, surgery)  # what is zero already scores lowest, and goes first again
        assert all(bool((scores[name][~kept] == 0).all()) for name, kept in keep.items())
        before, keep = keep, lowest(scores, sparsity * step / steps)
        assert not any(bool((keep[name] & ~kept).any()) for name, kept in before.items())
        weights = criterion.update(here, keep, surgery=surgery)
        with torch.no_grad():
            for name, tensor in weights.items():
                live[name].copy_(tensor)
    return keep, weights


def test_update_of_survivors_and_steps_lower_the_loss(trained):
    model, data = trained
    context = Context(model, elements(model), data=data, loss=default_loss)
    criterion = OptimalBrainSurgeon(form="block", gradients=400)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = {}
    for steps in (1, 4):
        kept, weights = in_steps(criterion, context, 0.7, steps)
        count = sum(int((~k).sum()) for k in kept.values())
        assert count == round(0.7 * sum(k.numel() for k in kept.values()))
        for name, keep in kept.items():
            assert int((weights[name][~keep] != 0).sum()) == 0
        losses[steps] = loss_on(model, data, weights)
        losses["zeros"] = loss_on(model, data, masked(model, kept))
        assert losses[steps] < losses["zeros"]
    assert losses[4] < losses[1]
    magnitude = loss_on(model, data, masked(model, lowest(Magnitude().score(context), 0.7)))
    assert losses[4] < losses[1] < magnitude
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_chosen_damping_is_reported_with_its_trials(trained):
    model, data = trained
    context = Context(model, elements(model), data=data, loss=default_loss)
    surgery = OptimalBrainSurgeon().fit(context)
    costs = {trial.damping: trial.cost for trial in surgery.trials}
    best = min(costs, key=costs.get)
    assert len(costs) == 6
    assert costs[best] < max(costs.values())
    fixed = OptimalBrainSurgeon(damping=best).fit(context)
    assert surgery.damping == pytest.approx(fixed.damping, rel=0.3)  # fewer rows: some were held out


def test_same_seed_and_data_give_the_same_bits(trained):
    model, data = trained
    context = Context(model, elements(model), data=data, loss=default_loss, seed=5)
    for criterion in (
        OptimalBrainSurgeon(),
        OptimalBrainSurgeon(form="block"),
        OptimalBrainDamage(method="hutchinson", probes=64),
        Fisher(labels="model"),
        KroneckerCurvature(slopes="sampled", form="obs"),
    ):
        first, second = criterion.score(context), criterion.score(context)
        assert all(torch.equal(first[n], second[n]) for n in first)
    other = dataclasses.replace(context, seed=6)
    drawn = Fisher(labels="model")
    assert not torch.equal(drawn.score(context)["0.weight"], drawn.score(other)["0.weight"])
