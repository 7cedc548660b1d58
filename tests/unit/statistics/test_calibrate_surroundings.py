"""Whatever is around the mathematics: mappings, modes, choice of samples, damping."""

import pytest
import torch
from torch import nn

from secateur.criteria.base import Context
from secateur.criteria.curvature.fisher import Fisher
from secateur.criteria.curvature.gauss_newton import GaussNewton
from secateur.criteria.curvature.kfac import KroneckerCurvature
from secateur.criteria.curvature.obd import OptimalBrainDamage
from secateur.criteria.curvature.obs import OptimalBrainSurgeon
from secateur.errors import InputError, RecipeError
from secateur.model.call import default_loss
from secateur.model.kernels import exact_derivatives
from secateur.statistics.curvature.damping import FRACTIONS, GRID, choose_damping
from secateur.statistics.curvature.inverse import Blocks
from secateur.statistics.gradients.functional import samples_of
from secateur.statistics.gradients.gradient_rows import flatten, gradient_rows, unflatten
from secateur.statistics.gradients.per_sample import per_sample_gradients
from secateur.types import Group, Span


class Tagger(nn.Module):
    """Takes keywords and returns a mapping with the loss computed inside, as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.head = nn.Parameter(torch.randn(3, 5))

    def forward(self, x, labels=None):
        logits = torch.tanh(self.inner(x)) @ self.head.T
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def tagger():
    torch.manual_seed(0)
    model = Tagger().double()
    data = [{"x": torch.randn(4, 4, dtype=torch.float64), "labels": torch.tensor([0, 1, 2, 0])} for _ in range(2)]
    groups = [
        Group(n, "element", tuple(p.shape), (Span(n, None, "self"),))
        for n, p in model.named_parameters()
        if p.dim() > 1
    ]
    return model, data, groups


def test_models_that_compute_their_loss_inside():
    model, data, groups = tagger()
    context = Context(model, groups, data=data)
    exact = OptimalBrainDamage(method="exact").diagonal(context).values
    auto = OptimalBrainDamage().diagonal(context)
    assert auto.method == {"head": "gauss-newton", "inner.weight": "exact"}
    for name in exact:
        torch.testing.assert_close(auto.values[name], exact[name], rtol=1e-9, atol=1e-12)
    for criterion in (GaussNewton(draws=3), Fisher(labels="model"), OptimalBrainSurgeon()):
        assert set(criterion.score(context)) == {"head", "inner.weight"}
    with pytest.raises(RecipeError, match="not the one of 'head'"):
        KroneckerCurvature().score(context)


@pytest.mark.parametrize("way", ["auto", "vmap", "loop"])
def test_gradients_carry_no_graph(way):
    model, data, _ = tagger()
    found = per_sample_gradients(model, default_loss, data[0], ["head"], way=way)["head"]
    assert not found.requires_grad


@pytest.mark.parametrize(
    "look",
    [
        lambda c: OptimalBrainDamage().diagonal(c),
        lambda c: OptimalBrainSurgeon(damping=1e-2).fit(c),
    ],
)
def test_reading_the_curvature_leaves_the_model_alone(look):
    model, data, groups = tagger()
    model.train()
    model.inner.weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        look(Context(model, groups, data=data))
    assert model.training
    assert not model.inner.weight.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def _fail_inside():
    with exact_derivatives(nn.Linear(1, 1)):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ZeroDivisionError


def test_switches_of_torch_are_put_back():
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ZeroDivisionError):
        _fail_inside()
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.matmul.allow_tf32) == before


def test_samples_of_keeps_the_form_and_what_is_shared():
    batch = {"x": torch.arange(6).view(3, 2), "shared": torch.arange(5), "rest": (torch.arange(3), "text", None)}
    part = samples_of(batch, 3, [2, 0])
    assert part["x"].tolist() == [[4, 5], [0, 1]]
    assert part["shared"].tolist() == [0, 1, 2, 3, 4]
    assert part["rest"][0].tolist() == [2, 0]
    assert part["rest"][1:] == ("text", None)


def test_rows_come_from_all_over_sorted_data_and_held_out_samples_do_not():
    model = nn.Linear(1, 1, bias=False)
    data = [torch.arange(100.0)[k : k + 30, None] for k in (0, 30, 60, 90)]  # the gradient is the input

    def loss(m, x):
        return m(x).mean()

    found = gradient_rows(model, loss, data, ["weight"], rows=8, held=4)
    rows = found.rows_Nd.flatten().tolist()
    held = [value for batch, _ in found.held_out for value in batch.flatten().tolist()]
    assert len(rows) == 10
    assert len(held) == 2  # a fifth of the twelve that were asked for
    assert not set(rows) & set(held)
    gaps = torch.tensor(sorted(rows + held)).diff()
    assert float(gaps.max()) <= 10.0  # (100 - 1) / 11, rounded
    every = gradient_rows(model, loss, data, ["weight"], rows=500, held=0)
    assert every.rows_Nd.flatten().tolist() == list(range(100))
    with pytest.raises(InputError, match="only once"):
        gradient_rows(model, loss, iter(data), ["weight"], rows=8, held=4)


def test_flat_vectors_come_back_in_shape_and_dtype():
    model, _, _ = tagger()
    names = ["head", "inner.bias"]
    tensors = {n: p.detach() for n, p in model.named_parameters() if n in names}
    back = unflatten(flatten(tensors, names), model, names)
    assert all(torch.equal(back[n], tensors[n]) for n in names)


def test_damping_is_the_one_with_the_lowest_loss_on_held_out_samples():
    """The curvature is a rough estimate of the true one: dampings that trust it fully lose."""
    torch.manual_seed(0)
    model = nn.Linear(30, 1, bias=False).double()
    true = torch.randn(400, 30, dtype=torch.float64)
    y = true @ model.weight.detach().T

    def loss(m, batch):
        return (m(batch[0]) - batch[1]).square().mean() / 2

    rows = true[:6]  # six samples for thirty weights
    estimate = rows.T @ rows / 6
    weights, alive = model.weight.detach().flatten(), torch.ones(30, dtype=torch.bool)
    mean = float(estimate.diagonal().mean())
    chosen, trials = choose_damping(
        lambda damping: Blocks([estimate], damping),
        mean,
        weights,
        alive,
        model,
        loss,
        ["weight"],
        [((true[200:], y[200:]), 200)],
    )
    assert [trial.damping for trial in trials] == list(GRID)
    assert all(len(trial.true) == len(FRACTIONS) for trial in trials)
    costs = {trial.damping: trial.cost for trial in trials}
    assert costs[chosen] == min(costs.values())
    assert chosen >= 0.1
    assert costs[GRID[0]] > 1.2 * costs[chosen]
