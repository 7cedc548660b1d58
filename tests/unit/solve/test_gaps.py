"""Fitting the layer before a gap: numpy least squares, held-out choice of the pull, padding, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from tiny_language_models import llama, small_gpt2
from torch import nn

import secateur as sc
from secateur.errors import NonFiniteError, RecipeError, UnsupportedError
from secateur.solve.gaps import refit_gaps
from secateur.solve.ridge import LADDER


class Block(nn.Module):
    def __init__(self, width=6, inner=9, *, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class PostNorm(Block):
    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Scaled(Block):
    def forward(self, x):
        return x + 0.5 * self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers, self.head = nn.ModuleList(blocks), nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def entry(size, *removed):
    return {"layers": {"size": size, "removed": list(removed), "lists": []}}


def without(model, *removed):
    cut = copy.deepcopy(model)
    cut.layers = nn.ModuleList(layer for i, layer in enumerate(cut.layers) if i not in removed)
    return cut


def stack(count, kind=Block, **options):
    torch.manual_seed(count)
    return Stack(*(kind(**options) for _ in range(count))).double().eval()


def data(batches, rows=20):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(rows, 6, generator=generator, dtype=torch.float64) for _ in range(batches)]


def states(model, x):
    """The hidden state behind every block, without a hook."""
    found = []
    with torch.no_grad():
        for layer in model.layers:
            x = layer(x)
            found.append(x)
    return found


def inner(block, x):
    with torch.no_grad():
        return torch.relu(block.up(block.norm(x)))


def ridge_of(x, y, ridge):
    """numpy: the change over columns of x and one for the bias, which is not damped."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    level = np.square(x[:, :-1]).sum(0).mean()
    damping = np.diag([ridge * level] * (x.shape[1] - 1) + [1e-12 * level])
    return np.linalg.solve(x.T @ x + damping, x.T @ y)


@pytest.mark.parametrize("removed", [(2,), (2, 3), (1, 3), (3, 4)])
def test_it_is_the_least_squares_of_numpy_gap_by_gap(removed):
    model, batches = stack(5), data(3)
    cut = without(model, *removed)
    kept = [i for i in range(5) if i not in removed]
    expected = copy.deepcopy(cut)
    fits = refit_gaps(model, cut, batches, layers=entry(5, *removed), ridge=1e-3)
    x = torch.cat(batches)
    for place, number in enumerate(kept):
        last = number
        while last + 1 in removed:
            last += 1
        if last == number:
            continue
        block = expected.layers[place]
        before = states(expected, x)[place - 1] if place else x
        features, goal = inner(block, before).numpy(), states(model, x)[last].numpy()
        missing = goal - states(expected, x)[place].numpy()
        change = ridge_of(features, missing, 1e-3)
        with torch.no_grad():
            block.down.weight += torch.from_numpy(change[:-1].T)
            block.down.bias += torch.from_numpy(change[-1])
        fit = fits[f"layers.{place}"]
        assert fit.weight == f"layers.{place}.down.weight"
        left = goal - states(expected, x)[place].numpy()
        np.testing.assert_allclose(fit.before, np.square(missing).sum() / np.square(goal).sum(), rtol=1e-9)
        np.testing.assert_allclose(fit.after, np.square(left).sum() / np.square(goal).sum(), rtol=1e-6)
        assert fit.after < 0.9 * fit.before
    assert len(fits) == sum(i + 1 in removed for i in kept)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], value, rtol=1e-8, atol=1e-9)


def test_a_block_that_is_linear_in_what_the_one_before_computes_comes_back_exactly():
    """The removed block multiplies features that the block before it has, so the fit loses nothing."""

    class Linear(Block):
        def forward(self, x):
            return x + self.more(self.of.features)

    class Remembering(Block):
        def forward(self, x):
            self.features = torch.relu(self.up(self.norm(x)))
            return x + self.down(self.features)

    torch.manual_seed(0)
    first = Remembering()
    second = Linear()
    second.more, second.__dict__["of"] = nn.Linear(9, 6), first
    model = Stack(first, second, Block()).double().eval()
    cut = Stack(copy.deepcopy(first), copy.deepcopy(model.layers[2])).double().eval()
    cut.head = copy.deepcopy(model.head)
    batches = data(2, rows=60)
    refit_gaps(model, cut, batches, layers=entry(3, 1), ridge=0.0)
    x = data(5)[-1]
    torch.testing.assert_close(cut(x), model(x), rtol=1e-8, atol=1e-8)


def test_the_pull_is_the_one_that_held_out_batches_like_best():
    model, batches = stack(3), data(8, rows=2)
    cut = without(model, 1)
    fitted = copy.deepcopy(cut)
    chosen = refit_gaps(model, fitted, batches, layers=entry(3, 1))["layers.0"]
    learn = torch.cat([b for i, b in enumerate(batches) if i % 4 != 3])
    held = torch.cat([batches[3], batches[7]])
    errors = {}
    for ridge in LADDER:
        features, goal = inner(cut.layers[0], learn).numpy(), states(model, learn)[1].numpy()
        change = ridge_of(features, goal - states(cut, learn)[0].numpy(), ridge)
        other = np.concatenate([inner(cut.layers[0], held).numpy(), np.ones((len(held), 1))], 1)
        goal = states(model, held)[1].numpy()
        missed = goal - states(cut, held)[0].numpy() - other @ change
        errors[ridge] = np.square(missed).sum() / np.square(goal).sum()
    assert chosen.ridge == min(errors, key=errors.get)
    # Few rows for so many columns: the least pull fits the sample.
    assert chosen.ridge > 1e-4
    np.testing.assert_allclose(chosen.after, errors[chosen.ridge], rtol=1e-6)
    # Once it is chosen, all batches count.
    x = torch.cat(batches)
    features, missing = inner(cut.layers[0], x).numpy(), states(model, x)[1].numpy() - states(cut, x)[0].numpy()
    change = (fitted.layers[0].down.weight - cut.layers[0].down.weight).detach().T
    np.testing.assert_allclose(change, ridge_of(features, missing, chosen.ridge)[:-1], rtol=1e-6, atol=1e-9)


def test_without_a_bias_the_weight_alone_is_fitted():
    model = stack(3, bias=False)
    cut = without(model, 1)
    before = copy.deepcopy(cut.state_dict())
    refit_gaps(model, cut, data(2), layers=entry(3, 1))
    changed = [name for name, value in cut.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["layers.0.down.weight"]


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return x + self.conv(torch.relu(x)[:, None])[:, 0]


class Bare(nn.Module):
    def forward(self, x):
        return x + torch.relu(x)


@pytest.mark.parametrize("kind", [Block, Scaled])
def test_half_precision_hides_no_factor(kind):
    """Rounded to bfloat16 single numbers are off by more than the factor makes; all of them together are not."""
    torch.manual_seed(0)
    model = Stack(kind(), Block(), Block()).bfloat16().eval()
    with torch.no_grad():
        model.layers[0].down.weight.mul_(0.5)
    cut, batches = without(model, 1), [batch.bfloat16() for batch in data(3, rows=2000)]
    if kind is Block:
        assert refit_gaps(model, cut, batches, layers=entry(3, 1), ridge=1e-2)["layers.0"].ridge == 1e-2
    else:
        with pytest.raises(UnsupportedError, match="not added to the hidden state"):
            refit_gaps(model, cut, batches, layers=entry(3, 1), ridge=1e-2)


@pytest.mark.parametrize(
    ("before", "words"),
    [(PostNorm, "not added to the hidden state"), (Scaled, "not added to the hidden state"),
     (Convolution, "no linear layer"), (Bare, "no weight of its own")],
)  # fmt: skip
def test_blocks_whose_last_product_is_not_added_are_refused(before, words):
    torch.manual_seed(0)
    model = Stack(before(), Block(), Block()).double().eval()
    cut = without(model, 1)
    kept = copy.deepcopy(cut.state_dict())
    with pytest.raises(UnsupportedError, match=words) as caught:
        refit_gaps(model, cut, data(2), layers=entry(3, 1))
    assert "layers.0" in str(caught.value)
    assert "finetune" in str(caught.value)
    assert all(torch.equal(value, kept[name]) for name, value in cut.state_dict().items())


def tied(what):
    """The block before the gap shares its last layer, its weight or its bias with one that stays."""
    model = stack(4)
    first, last = model.layers[1], model.layers[3]
    if what == "layer":
        first.down = last.down
    else:
        setattr(first.down, what, getattr(last.down, what))
    return model


@pytest.mark.parametrize(
    ("what", "words"), [("layer", "2 times"), ("weight", "2 times"), ("bias", "serves 2 layers"), ("zeros", "zeros")]
)
def test_a_product_whose_fit_would_change_others_or_cannot_be_seen_is_refused(what, words):
    model = tied(what) if what != "zeros" else stack(4)
    if what == "zeros":
        for parameter in model.layers[1].down.parameters():
            nn.init.zeros_(parameter)
    cut = without(model, 2)
    kept = copy.deepcopy(cut.state_dict())
    with pytest.raises(UnsupportedError, match=words):
        refit_gaps(model, cut, data(2), layers=entry(4, 2))
    assert all(torch.equal(value, kept[name]) for name, value in cut.state_dict().items())


class Turned(nn.Module):
    """Two stacks, of which the model names the second first."""

    def __init__(self):
        super().__init__()
        self.second = nn.ModuleList(Block() for _ in range(3))
        self.first = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in (*self.first, *self.second):
            x = layer(x)
        return x


def test_gaps_are_fitted_as_they_run_and_not_as_they_are_named():
    torch.manual_seed(0)
    model = Turned().double().eval()
    gone = {name: {"size": 3, "removed": [1], "lists": []} for name in ("second", "first")}
    cuts = []
    for order in (gone, dict(reversed(gone.items()))):
        cut = copy.deepcopy(model)
        for name in gone:
            setattr(cut, name, nn.ModuleList(layer for i, layer in enumerate(getattr(cut, name)) if i != 1))
        assert list(refit_gaps(model, cut, data(2), layers=order)) == ["first.0", "second.0"]
        cuts.append(cut.state_dict())
    assert all(torch.equal(value, cuts[1][name]) for name, value in cuts[0].items())


def test_a_block_that_runs_twice_is_refused():
    model = stack(3)
    cut = without(model, 1)
    cut.forward = lambda x: cut.head(cut.layers[1](cut.layers[0](cut.layers[0](x))))
    with pytest.raises(UnsupportedError, match="runs 2 times"):
        refit_gaps(model, cut, data(2), layers=entry(3, 1))


def test_nothing_before_the_first_block():
    model = stack(3)
    with pytest.raises(RecipeError, match=r"(?s)first block of 'layers'.*protect layers\.0"):
        refit_gaps(model, without(model, 0), data(2), layers=entry(3, 0))


def test_a_batch_that_is_not_finite_leaves_the_model_as_it_was():
    model = stack(4)
    cut = without(model, 1, 3)
    kept = copy.deepcopy(cut.state_dict())
    batches = data(3)
    batches[2][0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        refit_gaps(model, cut, batches, layers=entry(4, 1, 3))
    assert all(torch.equal(value, kept[name]) for name, value in cut.state_dict().items())


def test_an_iterator_that_is_read_once_is_refused():
    model = stack(3)
    with pytest.raises(Exception, match="every gap"):
        refit_gaps(model, without(model, 1), iter(data(2)), layers=entry(3, 1))


def test_tokens_that_the_mask_leaves_out_do_not_count():
    model = llama()
    cut = copy.deepcopy(model)
    cut.model.layers = nn.ModuleList(layer for i, layer in enumerate(cut.model.layers) if i != 2)
    layers = {"model.layers": {"size": 4, "removed": [2], "lists": []}}
    ids = torch.randint(0, 40, (6, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[3:, 8:] = 0
    other = torch.where(mask == 1, ids, (ids + 7) % 40)
    weights = []
    for tokens in (ids, other):
        one = copy.deepcopy(cut)
        refit_gaps(model, one, [{"input_ids": tokens, "attention_mask": mask}], layers=layers)
        weights.append(one.model.layers[1].mlp.down_proj.weight)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    unmasked = copy.deepcopy(cut)
    refit_gaps(model, unmasked, [{"input_ids": other}], layers=layers)
    assert not torch.allclose(unmasked.model.layers[1].mlp.down_proj.weight, weights[0], rtol=1e-3)


@pytest.mark.parametrize("make", [llama, small_gpt2])
def test_a_recipe_refits_before_the_gaps_and_the_result_loads_again(make, tmp_path):
    """Through the whole of `sc.prune`: Conv1D of GPT-2 lies turned round, and has a bias."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    ids = torch.randint(0, 40, (96, 12), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": part} for part in ids.split(12)]
    asked = {
        "data": batches, "granularity": "layer", "criterion": "block-influence", "target": {"count": 1},
        "expressible": True, "protect": ["*.0"], "overrides": ["measure.latency=false", "measure.quality=false"],
    }  # fmt: skip
    plain = sc.prune(model, batches[0], recover=[], **asked)
    fitted = sc.prune(model, batches[0], recover="refit", **asked)
    assert plain.plan.layers == fitted.plan.layers

    def missed(result):
        with torch.no_grad():
            goal, found = (one(ids, output_hidden_states=True).hidden_states[-1] for one in (model, result.model))
        return float((found - goal).square().sum() / goal.square().sum())

    assert missed(fitted) < 0.95 * missed(plain)
    fitted.save(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, fitted.model(ids).logits)
