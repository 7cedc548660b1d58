"""Refitting consumers: closed forms, numpy least squares, shortcuts, and a model that stays whole on errors."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import InputError, NonFiniteError, RecipeError, UnsupportedError
from secateur.planning.build import make_plan
from secateur.solve.refit import refit_consumers
from secateur.solve.ridge import LADDER, RefitWarning, least_squares


def cut_of(model, example, *, keep=None, **options):
    plan = make_plan(
        model, example, **{"target": {"sparsity": 0.5}, "granularity": "channel", "scope": "local"} | options
    )
    return plan.apply(model), plan.cuts


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 3))
def test_least_squares_is_that_of_numpy(seed, columns, outputs):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(20, columns)), rng.normal(size=(20, outputs))
    gram, cross = torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y)
    np.testing.assert_allclose(least_squares(gram, cross), np.linalg.lstsq(x, y, rcond=None)[0], rtol=1e-8, atol=1e-9)
    damping = 0.3 * np.trace(x.T @ x) / columns
    ridge = np.linalg.solve(x.T @ x + damping * np.eye(columns), x.T @ y)
    np.testing.assert_allclose(least_squares(gram, cross, ridge=0.3), ridge, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_a_bias_counts_beside_inputs_of_any_size(size, ridge):
    """Offsets of a thousand and inputs of a million, as tables of incomes and times have them."""
    rng = np.random.default_rng(1)
    x, y = size * (30 + rng.normal(size=(40, 3))), rng.normal(size=(40, 2)) + 100
    found = least_squares(*(torch.from_numpy(np.c_[x, np.ones(40)].T @ part) for part in (np.c_[x, np.ones(40)], y)),
                          ridge=ridge, columns=3)  # fmt: skip
    best = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
    np.testing.assert_allclose(found[:3] * size, best * size, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(x @ found[:3].numpy() + found[3].numpy(), x @ best + (y - x @ best).mean(0), atol=1e-3)


def test_dependent_inputs_give_the_solution_of_least_norm():
    x, y = np.array([[1.0, 2.0], [2.0, 4.0]]), np.array([[5.0], [10.0]])
    found = least_squares(torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y))
    np.testing.assert_allclose(found, [[1.0], [2.0]], atol=1e-9)


def duplicate(layer):
    """Two units, the second twice the first (T8)."""
    with torch.no_grad():
        layer.weight[1], layer.bias[1] = 2 * layer.weight[0], 2 * layer.bias[0]


def test_a_duplicate_is_made_good_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4)).double().eval()
    duplicate(model[0])
    model[2].weight.data[:, 1] = model[2].weight.data[:, 0]
    x = torch.randn(30, 3).double()
    cut, cuts = cut_of(model, x, criterion="magnitude")
    assert cuts["2.weight"][1].tolist() == [1]
    changed = refit_consumers(model, cut, [x[:7], x[7:]], cuts=cuts, ridge=0.0)
    assert set(changed) == {"2.weight", "2.bias"}
    torch.testing.assert_close(cut[2].weight.detach(), 1.5 * model[2].weight.detach()[:, 1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cut(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "reader",
    [
        lambda: nn.Conv2d(8, 5, 3, stride=2, padding=1),
        lambda: nn.Conv2d(8, 6, 3, dilation=2, groups=2),
        lambda: nn.Conv2d(8, 5, (1, 2), bias=False),
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    ],
)
def test_the_consumer_gets_the_least_squares_weights(reader):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), reader()).double().eval()
    x = torch.randn(20, 3, 6, 6).double()
    cut, cuts = cut_of(model, x[:2])
    before = copy.deepcopy(cut)
    with torch.no_grad():
        error = (cut(x) - model(x)).square().sum()
        changed = refit_consumers(model, cut, [x[:3], x[3:]], cuts=cuts, ridge=0.0, positions=None)
        best = (cut(x) - model(x)).square().sum()
        assert best < 0.9 * error
        for name in changed:  # a minimum: every direction leads upwards
            for sign in (1e-3, -1e-3):
                other = copy.deepcopy(cut)
                other.get_parameter(name).add_(sign * torch.randn_like(other.get_parameter(name)))
                assert (other(x) - model(x)).square().sum() > best
    same = [n for n, p in cut.named_parameters() if n not in changed]
    assert all(torch.equal(cut.get_parameter(n), before.get_parameter(n)) for n in same)


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.out = (nn.BatchNorm2d(8) if norm else nn.Identity()), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = F.relu(self.stem(x))
        self.h = h + self.norm(self.b(F.relu(self.a(h))))
        return self.out(self.h)


@pytest.mark.parametrize("norm", [False, True])
def test_the_branch_makes_good_what_the_shortcut_lost(norm):
    """A shortcut whose weights are damaged: the branch that is added to it is refitted to the sum."""
    torch.manual_seed(0)
    model = Residual(norm).double().eval()
    if norm:
        nn.init.uniform_(model.norm.weight, -2.0, 2.0)
        nn.init.uniform_(model.norm.running_var, 0.3, 2.0)
    x = torch.randn(16, 3, 5, 5).double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.stem.weight.add_(0.2 * torch.randn_like(other.stem.weight))
    refit_consumers(model, other, [x], cuts={}, names=["b.weight"], ridge=0.0, positions=None)
    with torch.no_grad():
        model(x), other(x)
        rows = F.relu(other.a(F.relu(other.stem(x)))).movedim(1, -1).flatten(0, 2)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt() if norm else torch.ones(8)
        rest = model.h - F.relu(other.stem(x))  # what the branch should give
        shift = model.norm.bias - model.norm.running_mean * scale if norm else torch.zeros(8)
        goal = (rest.movedim(1, -1).flatten(0, 2) - shift) / scale
        wanted = torch.linalg.lstsq(rows, goal).solution.T
    found = torch.cat([other.b.weight.detach().flatten(1), other.b.bias.detach()[:, None]], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


class Token(nn.Module):
    """A transformer's feed-forward block with a shortcut."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_neurons_of_a_feed_forward_block():
    torch.manual_seed(0)
    model, x = Token().double().eval(), torch.randn(40, 7, 6).double()
    cut, cuts = cut_of(model, x[:2], granularity="neuron")
    with torch.no_grad():
        error = (cut(x) - model(x)).norm()
        changed = refit_consumers(model, cut, [x[:9], x[9:]], cuts=cuts, ridge=0.0)
        h = F.gelu(cut.up(cut.norm(x))).flatten(0, 1)
        h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
        goal = (model(x) - x).flatten(0, 1)
        best = (h @ torch.linalg.lstsq(h, goal).solution - goal).norm()
        assert float((cut(x) - model(x)).norm()) == pytest.approx(float(best), rel=1e-6)
    assert set(changed) == {"down.weight", "down.bias"}
    assert best < 0.7 * error


def test_several_layers_correct_each_other():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.ReLU())], nn.Linear(16, 3)).double()
    x = torch.randn(400, 16).double()
    cut, cuts = cut_of(model.eval(), x[:2], target={"sparsity": 0.3})
    with torch.no_grad():
        error = (cut(x) - model(x)).norm()
        changed = refit_consumers(model, cut, [x], cuts=cuts)
        assert (cut(x) - model(x)).norm() < 0.75 * error
    assert list(changed) == ["2.weight", "2.bias", "4.weight", "4.bias", "6.weight", "6.bias"]


@pytest.mark.filterwarnings("ignore:refit left the outputs farther")  # 48 rows for 36 to 72 columns
def test_batches_do_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    x = torch.randn(12, 3, 9, 9).double()
    found = []
    for data in ([x], [x[:1], x[1:]], list(x.split(5))):
        cut, cuts = cut_of(model, x[:2])
        found.append(refit_consumers(model, cut, data, cuts=cuts, positions=4))
    for other in found[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=1e-8, atol=1e-10)


def test_inputs_that_never_vary_keep_their_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.copy_(torch.tensor([0.0, 0.0, -1e3, 0.0]))  # the third is dead
    cut = copy.deepcopy(model)
    refit_consumers(model, cut, [torch.randn(20, 4).double()], cuts={}, names=["2.weight"], ridge=0.0)
    torch.testing.assert_close(cut[2].weight, model[2].weight, rtol=1e-9, atol=1e-9)


def test_dtype_and_grad_flags_stay():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16().eval()
    x = torch.randn(64, 4).bfloat16()
    cut, cuts = cut_of(model, x, dtype="float32")
    cut[2].weight.requires_grad_(False)
    refit_consumers(model, cut, [x], cuts=cuts)
    assert cut[2].weight.dtype == torch.bfloat16
    assert not cut[2].weight.requires_grad
    assert cut[0].weight.requires_grad


def test_nothing_was_lost_nothing_is_done():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert refit_consumers(model, copy.deepcopy(model), [torch.randn(5, 3)], cuts={}) == {}


# Refusals leave the model as it was


class Broken:
    """Fails at the start of the second pass, after the first layer was written."""

    def __init__(self, batch):
        self.batch, self.passes = batch, 0

    def __iter__(self):
        self.passes += 1
        if self.passes > 1:
            raise OSError("the disk is gone")
        yield self.batch


def test_a_failure_half_way_restores_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(64, 4)
    cut, cuts = cut_of(model, x)
    before = copy.deepcopy(cut.state_dict())
    with pytest.raises(OSError, match="disk"):
        refit_consumers(model, cut, Broken(x), cuts=cuts)
    assert all(torch.equal(value, before[name]) for name, value in cut.state_dict().items())


@pytest.mark.parametrize("options", [{"ridge": -1.0}, {"ridge": float("nan")}, {"positions": 0}, {"names": ["2.wait"]}])
def test_bad_options_are_refused(options):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(RecipeError):
        refit_consumers(model, copy.deepcopy(model), [torch.randn(5, 3)], cuts={}, **options)


def test_data_that_cannot_be_refitted_on_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    cut, cuts = cut_of(model, x)
    with pytest.raises(InputError, match="only once"):
        refit_consumers(model, cut, iter([x]), cuts=cuts)
    with pytest.raises(InputError):
        refit_consumers(model, cut, [], cuts=cuts)
    with pytest.raises(NonFiniteError):
        refit_consumers(model, cut, [x * float("inf")], cuts=cuts)


def test_a_layer_that_cannot_be_refitted_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    cut, cuts = cut_of(model, x)
    with pytest.raises(UnsupportedError, match="reconstructed"):
        refit_consumers(model, cut, [x], cuts=cuts, names=["1.weight"])
    with pytest.warns(RefitWarning, match=r"left 1\.weight as it was cut: only linear layers and convolutions"):
        assert refit_consumers(model, cut, [x], cuts=cuts) == {}


def test_progress_counts_up_to_its_total():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(8, 3)
    cut, cuts = cut_of(model, x)
    seen = []
    refit_consumers(model, cut, [x, x], cuts=cuts, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def two_layers(seed, width=12):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 4)).double().eval()
    x = torch.randn(5, 3, 5).double()
    cut, cuts = cut_of(model, x[0], granularity="neuron", criterion="magnitude")
    return model, cut, cuts, list(x)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_held_out_batches_choose_the_ridge(seed, masked):
    """numpy: the fit of each ridge on batches 1, 2, 3 and 5, its error on batch 4, and the best one on all five."""
    model, cut, cuts, batches = two_layers(seed)
    masks = {}
    if masked:
        masks = {"2.weight": torch.rand(cut[2].weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.3}
        cut[2].weight.data *= masks["2.weight"]
    keep = masks.get("2.weight", torch.ones_like(cut[2].weight, dtype=torch.bool)).numpy()
    with torch.no_grad():
        features = [np.concatenate([cut[:2](x).numpy(), np.ones((len(x), 1))], 1) for x in batches]
        now = np.concatenate([cut[2].weight.numpy(), cut[2].bias.numpy()[:, None]], 1)
        missing = [model(x).numpy() - f @ now.T for x, f in zip(batches, features, strict=True)]

    def fit(numbers, ridge):
        x, y = (np.concatenate([some[i] for i in numbers]) for some in (features, missing))
        found = np.zeros_like(now)
        for row in range(len(now)):
            at = [*np.flatnonzero(keep[row]), now.shape[1] - 1]
            gram = x[:, at].T @ x[:, at]
            level = gram.diagonal()[:-1].mean()
            damping = np.diag([ridge * level] * (len(at) - 1) + [1e-12 * level])
            found[row, at] = np.linalg.solve(gram + damping, x[:, at].T @ y[:, row])
        return found

    errors = {r: np.square(missing[3] - features[3] @ fit([0, 1, 2, 4], r).T).sum() for r in LADDER}
    best = min(errors, key=errors.get)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RefitWarning)
        refit_consumers(model, cut, batches, cuts=cuts, masks=masks)
    found = torch.cat([cut[2].weight, cut[2].bias[:, None]], 1).detach().numpy()
    expected = now + fit(range(5), best) if errors[best] < np.square(missing[3]).sum() else now
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_a_fit_that_makes_held_out_batches_worse_is_left_out():
    """The unit that goes is the other one's twin where the layer learns, and its opposite where it is judged."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double().eval()
    model[0].weight.data, model[1].weight.data = torch.eye(2).double(), torch.tensor([[1.0, 0.5]]).double()
    learn = [torch.tensor([[float(i), float(i)]]).double() for i in (1, 2, 3)]
    cut = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)).double().eval()
    cut[0].weight.data, cut[1].weight.data = model[0].weight.data[:1].clone(), model[1].weight.data[:, :1].clone()
    cuts = {"0.weight": {0: torch.tensor([0])}, "1.weight": {1: torch.tensor([0])}}
    twin, opposite = learn[0], torch.tensor([[1.0, -1.0]]).double()
    with pytest.warns(RefitWarning, match=r"left 1 of 1 layers as they were cut \(1\.weight\)"):
        assert refit_consumers(model, cut, [*learn, opposite], cuts=cuts) == {}
    assert cut[1].weight.item() == 1.0
    refit_consumers(model, cut, [*learn, twin], cuts=cuts)
    assert cut[1].weight.item() == pytest.approx(1.5, rel=1e-3)


def test_the_report_says_which_layers_a_refit_left():
    """Data of pure noise in few rows: no fit carries over to the batch that is held out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)).eval()
    model[0].weight.data, model[1].weight.data = torch.eye(2), torch.tensor([[1.0, 0.5], [0.3, 0.2], [-0.4, 0.1]])
    rows = [torch.tensor([[float(i), i * s]]) for i, s in ((1, 1), (2, 1), (3, 1), (1, -1))]
    result = sc.prune(
        model, rows[0], data=rows, criterion="magnitude", granularity="neuron", target={"count": 1}, recover="refit",
        overrides=["measure.latency=false", "measure.quality=false"],
    )  # fmt: skip
    assert any("refit left 1 of 1 layers" in doubt for doubt in result.report.warnings), result.report.warnings


def test_the_report_says_which_layers_have_no_closed_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    result = sc.prune(
        model, x, data=[x], criterion="magnitude", granularity="channel", target={"count": 1}, recover="refit",
        overrides=["measure.latency=false", "measure.quality=false"],
    )  # fmt: skip
    assert any("refit left 2.weight as it was cut" in doubt for doubt in result.report.warnings), result.report.warnings


class Masking(nn.Module):
    """Adds a mask of nothing where a row is padded, as attention does: another call, and the same result."""

    def __init__(self, *, branches):
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.branches = branches

    def forward(self, x):
        h = torch.relu(self.middle(torch.relu(self.up(x))))
        if self.branches and bool((x == 0).any()):
            h = h + torch.zeros_like(h)
        return x + self.down(h)


def some_padded():
    torch.manual_seed(3)
    batches = [torch.randn(12, 5).double() for _ in range(5)]
    for number in (1, 2, 4):
        batches[number][5:, 3:] = 0
    return batches


def test_batches_may_differ_in_the_calls_that_a_model_makes():
    found = []
    for branches in (False, True):
        torch.manual_seed(0)
        model = Masking(branches=branches).double().eval()
        cut, cuts = cut_of(model, some_padded()[0], granularity="neuron", criterion="magnitude")
        found.append(refit_consumers(model, cut, some_padded(), cuts=cuts))
    assert set(found[0]) == {"middle.weight", "middle.bias", "down.weight", "down.bias"}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_models_that_do_something_else_on_every_batch_are_refused():
    class Restless(Masking):
        def forward(self, x):
            for _ in range(len(x)):
                x = x + torch.zeros_like(x)
            return super().forward(x)

    torch.manual_seed(0)
    model = Restless(branches=False).double().eval()
    batches = [torch.randn(n, 5).double() for n in range(2, 15)]
    cut, cuts = cut_of(model, batches[0], granularity="neuron", criterion="magnitude")
    before = copy.deepcopy(cut.state_dict())
    with pytest.raises(UnsupportedError, match="other things"):
        refit_consumers(model, cut, batches, cuts=cuts)
    assert all(torch.equal(value, before[name]) for name, value in cut.state_dict().items())


@pytest.mark.parametrize("whole", [False, True])
def test_an_encoder_takes_batches_with_and_without_padding(whole, monkeypatch):
    """transformers leaves the mask out where no token is padded."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    ids, mask = torch.randint(1, 40, (6, 10)), torch.ones(6, 10, dtype=torch.int64)
    mask[3:, 6:] = 0
    data = [{"input_ids": ids, "attention_mask": part} for part in (mask, torch.ones_like(mask), mask)]
    plan = make_plan(
        model, data[0], target={"sparsity": 0.5}, granularity="neuron", scope="local", protect=["type:Embedding"]
    )
    if whole:
        monkeypatch.setattr("secateur.solve.refit.blocks_alone", lambda *args: None)
    changed = refit_consumers(model, plan.apply(copy.deepcopy(model)), data, cuts=plan.cuts)
    assert len([name for name in changed if name.endswith("output.dense.weight")]) == 3
