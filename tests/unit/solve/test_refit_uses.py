"""Weights that a model uses in other ways than once, with a bias of its own, on every batch: against numpy."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import UnsupportedError
from secateur.planning.build import make_plan
from secateur.solve.refit import refit_consumers
from secateur.solve.ridge import RefitWarning


def cut_of(model, example, **options):
    asked = {"target": {"sparsity": 0.5}, "granularity": "neuron", "scope": "local", "criterion": "magnitude"}
    plan = make_plan(model, example, **asked | options)
    return plan.apply(copy.deepcopy(model)), plan.cuts


def rows(count=3, size=24, width=5):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, width, generator=generator, dtype=torch.float64) for _ in range(count)]


class Reader(nn.Module):
    """What a product is added to is not always a bias."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.kind = nn.Linear(5, 8), kind
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(3 * torch.randn(4))
        self.register_buffer("fixed", 3 * torch.randn(4))

    def forward(self, x):
        h = torch.relu(self.up(x))
        if self.kind == "buffer":
            return F.linear(h, self.weight, self.fixed)
        if self.kind == "computed":
            return F.linear(h, self.weight, self.bias * 2)
        if self.kind == "half":
            return torch.addmm(self.bias, h, self.weight.t(), beta=0.5)
        if self.kind == "activation":
            return torch.addmm(x[:, :4], h, self.weight.t())
        if self.kind == "factor":
            return torch.addmm(self.bias, h, self.weight.t(), alpha=0.5)
        return F.linear(h, self.weight, self.bias)


@pytest.mark.parametrize("kind", ["buffer", "computed", "half", "activation", "bias"])
def test_whatever_a_product_is_added_to_the_change_is_that_of_numpy(kind):
    model = Reader(kind).double().eval()
    cut, cuts = cut_of(model, rows()[0])
    before = copy.deepcopy(cut)
    changed = refit_consumers(model, cut, rows(), cuts=cuts, ridge=0.0)
    assert set(changed) == {"weight", "bias"} if kind == "bias" else {"weight"}
    x = torch.cat(rows())
    with torch.no_grad():
        inputs = torch.relu(before.up(x)).numpy()
        inputs = np.concatenate([inputs, np.ones((len(x), 1))], 1) if kind == "bias" else inputs
        best = np.linalg.lstsq(inputs, (model(x) - before(x)).numpy(), rcond=None)[0]
        np.testing.assert_allclose((cut.weight - before.weight).numpy(), best[:4].T, rtol=1e-6, atol=1e-9)
        if kind == "bias":
            np.testing.assert_allclose((cut.bias - before.bias).numpy(), best[4], rtol=1e-6, atol=1e-9)


def test_a_factor_inside_of_the_call_is_left_and_named():
    model = Reader("factor").double().eval()
    cut, cuts = cut_of(model, rows()[0])
    with pytest.warns(RefitWarning, match=r"refit left weight as it was cut: .*alpha"):
        assert refit_consumers(model, cut, rows(), cuts=cuts) == {}
    with pytest.raises(UnsupportedError, match="alpha"):
        refit_consumers(model, cut, rows(), cuts=cuts, names=["weight"])


class Tied(nn.Module):
    """Two layers behind the cut that share a weight or a bias."""

    def __init__(self, *, weight=False, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        if weight:
            self.two.weight = self.one.weight
        if bias:
            self.two.bias = self.one.bias

    def forward(self, x):
        h = torch.relu(self.up(x))
        return torch.cat([self.one(h), self.two(h * h)], -1)


def halves(model, cut):
    """What both layers read in the cut model, and what is missing behind them."""
    x = torch.cat(rows())
    with torch.no_grad():
        h = torch.relu(cut.up(x)).numpy()
        return (h, h * h), np.split((model(x) - cut(x)).numpy(), 2, axis=1)


def test_a_tied_weight_is_fitted_on_all_of_its_uses_and_their_biases_stay():
    model = Tied(weight=True).double().eval()
    cut, cuts = cut_of(model, rows()[0])
    before = copy.deepcopy(cut)
    (changed,) = refit_consumers(model, cut, rows(), cuts=cuts, ridge=0.0).items()
    inputs, missing = halves(model, before)
    best = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(missing), rcond=None)[0]
    np.testing.assert_allclose((changed[1] - before.one.weight.detach()).numpy(), best.T, rtol=1e-6, atol=1e-9)
    assert cut.two.weight is cut.one.weight
    assert torch.equal(cut.one.bias, before.one.bias)


def test_a_bias_that_two_layers_add_stays():
    model = Tied(bias=True).double().eval()
    cut, cuts = cut_of(model, rows()[0])
    before = copy.deepcopy(cut)
    changed = refit_consumers(model, cut, rows(), cuts=cuts, ridge=0.0)
    assert set(changed) == {"one.weight", "two.weight"}
    for layer, inputs, missing in zip(("one", "two"), *halves(model, before), strict=True):
        best = np.linalg.lstsq(inputs, missing, rcond=None)[0]
        moved = changed[f"{layer}.weight"] - before.get_parameter(f"{layer}.weight").detach()
        np.testing.assert_allclose(moved.numpy(), best.T, rtol=1e-6, atol=1e-9)


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids)))


def test_a_head_that_is_the_embedding_stays_and_is_named():
    """Fitted as a head it would be another embedding, and everything that was fitted before would read other inputs."""
    model = TiedHead().double().eval()
    ids = [torch.randint(0, 11, (6, 4), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    cut, cuts = cut_of(model, ids[0])
    before = cut.embed.weight.detach().clone()
    with pytest.warns(RefitWarning, match=r"left embed\.weight as it was cut: the model also calls embedding"):
        changed = refit_consumers(model, cut, ids, cuts=cuts)
    assert "layer.weight" in changed
    assert torch.equal(cut.embed.weight, before)


class Loop(nn.Module):
    """One pair of layers as often as asked: each turn reads what the turn before gave."""

    def __init__(self, turns, *, growth=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.turns, self.growth = nn.Linear(5, 8), nn.Linear(8, 5), turns, growth

    def forward(self, x):
        for _ in range(self.turns):
            x = x + self.growth * self.down(torch.relu(self.up(x)))
        return x


def missed(model, cut, data):
    """Sum of squares of what the second layer gives too much or too little, over all of its uses."""
    found = []
    for one in (model, cut):
        given = []
        handle = one.down.register_forward_hook(lambda _, __, output, given=given: given.append(output))
        with torch.no_grad():
            [one(x) for x in data]
        handle.remove()
        found.append(torch.cat(given))
    return float((found[0] - found[1]).square().sum())


@pytest.mark.parametrize(("turns", "growth", "kept"), [(4, 1.0, True), (6, -3.0, False)])
def test_a_fit_of_a_layer_that_feeds_itself_is_kept_if_it_is_better_with_its_new_inputs(turns, growth, kept):
    model, data = Loop(turns, growth=growth).double().eval(), rows(8)
    cut, cuts = cut_of(model, data[0])
    before = copy.deepcopy(cut)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        changed = refit_consumers(model, cut, data, cuts=cuts, ridge=None)
    assert bool(changed) is kept
    if kept:
        assert missed(model, cut, data) < 0.7 * missed(model, before, data)
    else:
        assert "changes its own inputs" in str(said[-1].message)
        assert all(torch.equal(value, before.state_dict()[name]) for name, value in cut.state_dict().items())


class Recurrent(nn.Module):
    """A layer whose outputs come back as its inputs through a curve."""

    def __init__(self, turns):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.turns = nn.Linear(5, 8), nn.Linear(8, 5), turns

    def forward(self, x):
        for _ in range(self.turns):
            x = torch.tanh(self.b(torch.relu(self.a(x))))
        return x


@pytest.mark.parametrize("turns", [1, 3])
def test_layers_that_are_nearer_and_leave_the_outputs_farther_are_said_to(turns):
    model, data = Recurrent(turns).double().eval(), rows(8)
    cut, cuts = cut_of(model, data[0])
    before = copy.deepcopy(cut)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refit_consumers(model, cut, data, cuts=cuts, ridge=0.0)
    first = data[0][:8]  # what the report speaks of
    with torch.no_grad():
        now, then = (float((model(first) - other(first)).square().sum()) for other in (cut, before))
    worse = now > then
    assert worse == (turns > 1)
    assert any("farther from the original's" in str(one.message) for one in said) == worse


class Pairs(nn.Module):
    """Takes batches of an even number of samples alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x.view(-1, 2, 5)))).view(-1, 4)


def test_a_model_that_takes_no_batch_of_one_is_fitted():
    model, data = Pairs().double().eval(), rows()
    cut, cuts = cut_of(model, data[0], proof="example")
    assert set(refit_consumers(model, cut, data, cuts=cuts, ridge=0.0)) == {"down.weight", "down.bias"}


class Turns(nn.Module):
    """One pair of layers per place of a sequence, so batches of another length make other calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        return torch.stack([self.down(torch.relu(self.up(x[:, i]))) for i in range(x.shape[1])], 1)


def fitted_on(model, cut, pairs):
    """numpy: the layer `down` fitted on rows of its inputs and of what is missing."""
    inputs = np.concatenate([np.concatenate([x, np.ones((len(x), 1))], 1) for x, _ in pairs])
    return np.linalg.lstsq(inputs, np.concatenate([y for _, y in pairs]), rcond=None)[0]


def test_batches_in_which_a_layer_runs_more_often_than_in_the_first_count_whole():
    model = Turns().double().eval()
    data = [torch.randn(9, size, 5, dtype=torch.float64) for size in (2, 3, 1, 4)]
    cut, cuts = cut_of(model, data[0])
    before = copy.deepcopy(cut)
    refit_consumers(model, cut, data, cuts=cuts, ridge=0.0)
    with torch.no_grad():
        pairs = [
            (torch.relu(before.up(x)).flatten(0, 1).numpy(), (model(x) - before(x)).flatten(0, 1).numpy()) for x in data
        ]
    best = fitted_on(model, cut, pairs)
    moved = torch.cat([cut.down.weight - before.down.weight, (cut.down.bias - before.down.bias)[:, None]], 1)
    np.testing.assert_allclose(moved.detach().numpy(), best.T, rtol=1e-6, atol=1e-9)


class Routed(nn.Module):
    """Whole batches, or the rows of one, go to one of two layers of the same shape, by the data."""

    def __init__(self, *, by_row=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.a, self.b, self.by_row = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4), by_row

    def forward(self, x):
        h = torch.relu(self.up(x))
        if not self.by_row:
            return self.a(h) if bool(x.sum() > 0) else self.b(h)
        there = h.sum(-1) > 2.0
        out = torch.zeros(len(x), 4, dtype=x.dtype)
        return out.index_add(0, torch.nonzero(there)[:, 0], self.a(h[there]))


def test_a_batch_that_another_layer_reads_is_not_taken_for_this_one():
    model = Routed().double().eval()
    data = [x.abs() if number % 2 == 0 else -x.abs() for number, x in enumerate(rows(4))]
    cut, cuts = cut_of(model, data[0], examples=[data[1]])
    before = copy.deepcopy(cut)
    with pytest.warns(RefitWarning, match=r"left b\.weight as it was cut: the first batch does not reach it"):
        changed = refit_consumers(model, cut, data, cuts=cuts, ridge=0.0)
    assert set(changed) == {"a.weight", "a.bias"}
    with torch.no_grad():
        pairs = [(torch.relu(before.up(x)).numpy(), (model(x) - before(x)).numpy()) for x in data[::2]]
    moved = torch.cat([cut.a.weight - before.a.weight, (cut.a.bias - before.a.bias)[:, None]], 1)
    np.testing.assert_allclose(moved.detach().numpy(), fitted_on(model, cut, pairs).T, rtol=1e-6, atol=1e-9)


def test_rows_that_the_cut_model_sends_elsewhere_are_refused():
    model = Routed(by_row=True).double().eval()
    cut = copy.deepcopy(model)
    kept = torch.arange(4)
    cut.up.weight, cut.up.bias = nn.Parameter(model.up.weight[kept].clone()), nn.Parameter(model.up.bias[kept].clone())
    cut.a.weight = nn.Parameter(model.a.weight[:, kept].clone())
    before = copy.deepcopy(cut.state_dict())
    with pytest.raises(UnsupportedError, match=r"'a\.weight' reads \d+ rows of a batch after the cut"):
        refit_consumers(model, cut, rows(), cuts={"up.weight": {0: kept}, "a.weight": {1: kept}})
    assert all(torch.equal(value, before[name]) for name, value in cut.state_dict().items())


class SharedDown(nn.Module):
    """Blocks of a stack that share their last layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(5))
        self.blocks[3]["down"] = self.blocks[0]["down"]

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return x


def test_a_layer_that_two_blocks_share_is_fitted_on_what_it_reads_in_both(monkeypatch):
    model, asked = SharedDown().double().eval(), []
    monkeypatch.setattr("secateur.solve.refit.blocks_alone", lambda *args: asked.append(args))
    data = rows(3, width=6)
    kept = torch.arange(4)
    cut = copy.deepcopy(model)
    cuts = {}
    for number, block in enumerate(cut.blocks):
        block["up"].weight = nn.Parameter(block["up"].weight[kept].clone())
        block["up"].bias = nn.Parameter(block["up"].bias[kept].clone())
        cuts |= {f"blocks.{number}.up.weight": {0: kept}, f"blocks.{number}.down.weight": {1: kept}}
    for number in (0, 1, 2, 4):
        cut.blocks[number]["down"].weight = nn.Parameter(cut.blocks[number]["down"].weight[:, kept].clone())
    changed = refit_consumers(model, cut, data, cuts=cuts)
    assert asked == []
    assert len([name for name in changed if name.endswith("down.weight")]) == 4
    assert cut.blocks[3]["down"].weight is cut.blocks[0]["down"].weight
