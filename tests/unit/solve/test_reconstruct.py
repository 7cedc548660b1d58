"""Training of sub-blocks and unequal shares of blocks: what they find, what they promise, and that they go on."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur as sc
from secateur.errors import RecipeError
from secateur.kinds.weights import parse
from secateur.request import Named, Request, Target
from secateur.solve import SOLVERS, patterns
from secateur.solve.blocks import allocation
from secateur.solve.blocks.distance import distance
from secateur.solve.blocks.run import Settings, prune_blocks
from secateur.solve.blocks.settings import Reconstruction, UnequalShares
from secateur.solve.blocks.taps import END, find_parts, read_parts

WIDTH, TOKENS = 12, 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden):
        return self.o(functional.scaled_dot_product_attention(self.q(hidden), self.k(hidden), self.v(hidden)))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, hidden):
        return self.down(functional.gelu(self.up(hidden)))


class Block(nn.Module):
    """How blocks join their branches: one after the other, normed behind the sum, side by side, in place, or not."""

    def __init__(self, form):
        super().__init__()
        self.form, self.attn, self.mlp = form, Attention(), Mlp()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden):
        if self.form == "pre":
            hidden = hidden + self.attn(self.one(hidden))
            return hidden + self.mlp(self.two(hidden))
        if self.form == "post":
            hidden = self.one(self.attn(hidden) + hidden)
            return self.two(hidden + self.mlp(hidden))
        if self.form == "flattened":
            hidden = hidden + self.attn(self.one(hidden))
            rows = hidden.reshape(-1, WIDTH)
            return (rows + self.mlp(self.two(rows))).view(hidden.shape)
        if self.form == "parallel":
            read = self.one(hidden)
            return self.mlp(read) + self.attn(read) + hidden
        if self.form == "parallel, other way":
            read = self.one(hidden)
            return hidden + (self.attn(read) + self.mlp(read))
        if self.form == "in place":
            hidden += self.attn(self.one(hidden))
            out = self.mlp(self.two(hidden))
            return out.add_(hidden)
        return self.mlp(self.attn(hidden))


ATTENTION = tuple(f"attn.{name}.weight" for name in "qkvo")
MLP = ("mlp.up.weight", "mlp.down.weight")
FORMS = {
    "pre": [ATTENTION, MLP],
    "post": [ATTENTION, MLP],
    "in place": [ATTENTION, MLP],
    "flattened": [ATTENTION, MLP],
    "parallel": [MLP + ATTENTION],
    "parallel, other way": [MLP + ATTENTION],
    "chain": [ATTENTION + MLP],
}


def a_block(form):
    torch.manual_seed(0)
    return Block(form).double().eval()


@pytest.mark.parametrize("form", FORMS)
def test_sub_blocks_are_found_by_how_their_outputs_are_joined(form):
    block = a_block(form)
    parameters = {name: p for name, p in block.named_parameters() if p.dim() == 2}
    hidden = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    parts = find_parts(block, hidden, parameters)
    assert [set(part.names) for part in parts] == [set(names) for names in FORMS[form]]
    with torch.no_grad():
        found = read_parts(block, hidden.clone(), parts)
        outputs = {}
        for name in ("attn", "mlp"):
            block.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name: outputs.update({name: out.clone()})
            )
        whole = block(hidden.clone())
    if len(parts) == 2:
        assert all(torch.equal(found[i][0], outputs[name]) for i, name in enumerate(("attn", "mlp")))
        assert all(part.sum != END for part in parts)
    elif form.startswith("parallel"):
        assert torch.equal(found[0][0], outputs["mlp"] + outputs["attn"])
        assert torch.equal(found[0][1], whole)
    else:
        assert parts[0].sum == END
        assert torch.equal(found[0][0], whole)


class Net(nn.Module):
    def __init__(self, form="pre", depth=3):
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(Block(form) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 40)

    def forward(self, ids, attention_mask=None):
        hidden = self.table(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def net(form="pre", depth=3):
    torch.manual_seed(0)
    return Net(form, depth).double().eval()


def data(batches=8):
    g = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, 40, (2, TOKENS), generator=g)} for _ in range(batches)]


def run(model, batches, name="admm", *, share=0.5, progress=None, unit="element", **settings):
    asked = Request(target=Target(sparsity=share), granularity=(Named(unit),), scope="row", criterion=Named("x"))
    return prune_blocks(
        model,
        {key: value[:1, :8] for key, value in batches[0].items()},
        batches,
        solver=SOLVERS.build(name, {}),
        granularity=parse(unit),
        request=asked,
        settings=Settings(**settings),
        progress=progress,
    )


def pruned(model, out):
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for key, mask in out.masks.items():
            copied.get_parameter(key).copy_(out.weights[key] if out.weights else copied.get_parameter(key) * mask)
    return copied


HOW = Reconstruction(epochs=3, lr=3e-3)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("target", "normalise"),
    [("branch", "coordinate"), ("branch", "total"), ("stream", "coordinate"), ("stream", "token")],
)
def test_training_lowers_the_error_on_held_out_batches_and_keeps_every_zero(target, normalise):
    model, batches = net(depth=2), data(6)
    before = copy.deepcopy(model.state_dict())
    how = Reconstruction(epochs=3, lr=3e-3, target=target, normalise=normalise)
    plain, out = run(model, batches), run(model, batches, reconstruct=how)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    total = sum(mask.numel() for mask in out.masks.values())
    assert sum(int((~mask).sum()) for mask in out.masks.values()) == round(0.5 * total)
    for key, mask in out.masks.items():
        gone = out.weights[key][~mask]
        assert bool((gone == 0).all())
        assert not bool(torch.signbit(gone).any())
    assert len(out.tuned) == 4
    assert all(
        one.branch and one.after <= one.before and (one.after < one.before) == (one.epochs > 0) for one in out.tuned
    )
    assert sum(one.epochs > 0 for one in out.tuned) > 1
    other = data(24)[8:]
    with torch.no_grad():
        plain_error, error = (
            sum(float((pruned(model, one)(**b) - model(**b)).pow(2).mean()) for b in other) for one in (plain, out)
        )
    assert error < plain_error


def test_one_linear_sub_block_comes_to_its_masked_least_squares():
    """Closed form: with nothing held out and one linear layer, training ends at the regression on kept inputs."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, hidden):
            return hidden + self.line(hidden)

    model = net()
    model.blocks = nn.ModuleList(Line() for _ in range(2)).double()
    batches = [{"ids": torch.cat([batch["ids"] for batch in data(4)])}]
    how = Reconstruction(epochs=250, lr=0.05, normalise="total")
    out = run(model, batches, "wanda", hold_out=0.0, reconstruct=how)
    mask, weight = out.masks["blocks.0.line.weight"], model.blocks[0].line.weight.detach()
    with torch.no_grad():
        rows = torch.cat([model.table(b["ids"]) for b in batches]).reshape(-1, WIDTH)
    for row in range(WIDTH):
        kept = mask[row]
        expected = torch.linalg.lstsq(rows[:, kept], rows @ weight[row]).solution
        torch.testing.assert_close(out.weights["blocks.0.line.weight"][row, kept], expected, rtol=1e-3, atol=1e-4)


def test_a_training_that_makes_held_out_batches_worse_is_refused():
    model, batches = net(depth=2), data(4)
    plain = run(model, batches, targets="dense")
    out = run(model, batches, reconstruct=Reconstruction(epochs=1, lr=50.0))
    assert all(one.epochs == 0 and one.after == one.before for one in out.tuned)
    assert all(torch.equal(plain.weights[key], out.weights[key]) for key in plain.weights)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "targets"), [("wanda", "dense"), ("admm", "own"), ("sparsegpt", "dense")])
@pytest.mark.parametrize("form", ["parallel", "in place"])
def test_any_solver_and_any_form_of_block(name, targets, form):
    out = run(net(form, 2), data(4), name, targets=targets, reconstruct=HOW)
    assert set(out.weights) == set(out.masks)
    assert [one.branch for one in out.tuned] == [True] * (2 if form == "parallel" else 4)
    assert all(one.after <= one.before for one in out.tuned)


@pytest.mark.parametrize("form", ["pre", "flattened"])
def test_padding_is_not_learned_from(form):
    model, batches = net(form, 2), data(4)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 10:] = 0
    # What attention hands on must not depend on padding either, for two paddings to be alike.
    for block in model.blocks:
        block.attn = Mlp().double()
    padded = [{**batch, "attention_mask": mask} for batch in batches]
    other = [{**batch, "ids": torch.where(mask == 0, 7, batch["ids"])} for batch in padded]
    one, two = (run(model, given, reconstruct=HOW) for given in (padded, other))
    assert all(torch.allclose(one.weights[key], two.weights[key], rtol=0, atol=1e-12) for key in one.weights)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("settings", [{"reconstruct": HOW}, {"reconstruct": HOW, "allocation": UnequalShares()}])
def test_a_run_that_was_killed_goes_on_with_the_same_result(tmp_path, settings):
    model, batches = net(depth=2), data(4)
    steps = []
    whole = run(model, batches, **settings, progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))
    after = len(steps) - 2  # inside the last block

    def die(done, total):
        if done == after:
            raise KilledError

    with pytest.raises(KilledError):
        run(model, batches, **settings, progress=die, checkpoint=tmp_path)
    again = run(model, batches, **settings, checkpoint=tmp_path)
    assert all(torch.equal(whole.weights[key], again.weights[key]) for key in whole.weights)
    assert all(torch.equal(whole.masks[key], again.masks[key]) for key in whole.masks)
    assert again.tuned == whole.tuned
    assert again.choice == whole.choice


def test_outliers_give_shares_as_published():
    sizes = {"a": 100, "b": 100, "c": 200}
    shares = allocation.owl_shares({"a": 0.0, "b": 0.02, "c": 0.01}, sizes, 0.7, 0.08)
    assert shares == pytest.approx({"a": 0.78, "b": 0.62, "c": 0.7})
    flat = allocation.owl_shares(dict.fromkeys(sizes, 0.3), sizes, 0.7, 0.08)
    assert flat == pytest.approx(dict.fromkeys(sizes, 0.7))
    scores = [torch.tensor([1.0] * 9 + [11.0]), torch.tensor([1.0] * 10)]  # mean 1.5
    assert allocation.outlier_share(scores, 5.0) == pytest.approx(0.05)
    near = allocation.owl_shares({"a": 0.0, "b": 1.0}, {"a": 1, "b": 1}, 0.96, 0.08)
    assert max(near.values()) <= allocation.MOST + 1e-12


def test_curves_give_the_shares_that_lose_least():
    """Against a search over all shares on a grid."""
    g = torch.Generator().manual_seed(0)
    sizes = {"a": 4000, "b": 4000}
    scores = {"a": [torch.rand(4000, generator=g)], "b": [torch.randn(4000, generator=g).abs() ** 3]}
    curves = {key: allocation.loss_curve(one, 0.4, 0.6) for key, one in scores.items()}
    shares = allocation.curve_shares(curves, sizes, 0.5, 0.1)
    assert sum(shares.values()) == pytest.approx(1.0)

    def lost(key, share):
        sums = scores[key][0].double().square().sort().values.cumsum(0)
        return float(sums[round(share * 4000) - 1] / sums[-1])

    best = min(range(-8, 9), key=lambda i: lost("a", 0.5 + i * 0.0125) + lost("b", 0.5 - i * 0.0125))
    assert shares["a"] == pytest.approx(0.5 + best * 0.0125)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["owl", "curve"])
@pytest.mark.parametrize("check", [True, False])
def test_unequal_shares_meet_the_exact_count_and_are_taken_only_where_they_help(name, check):
    model, batches = net(depth=2), data(4)
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[:3] *= 12  # outliers
    out = run(model, batches, share=0.63, allocation=UnequalShares(name=name, limit=0.1, outliers=3.0, check=check))
    total = sum(mask.numel() for mask in out.masks.values())
    assert sum(int((~mask).sum()) for mask in out.masks.values()) == round(0.63 * total)
    choice, plain = out.choice, run(model, batches, share=0.63)
    assert max(choice.shares.values()) > min(choice.shares.values())
    if check:
        assert choice.taken == (choice.unequal < choice.equal)
        assert choice.equal == pytest.approx(distance(model, batches[-1:], plain.masks, plain.weights))
        assert distance(model, batches[-1:], out.masks, out.weights) == pytest.approx(min(choice.equal, choice.unequal))
    if choice.taken:
        for block, share in choice.shares.items():
            gone = [(int((~m).sum()), m.numel()) for key, m in out.masks.items() if key.startswith(block + ".")]
            assert sum(a for a, _ in gone) / sum(b for _, b in gone) == pytest.approx(share, abs=2e-3)
    else:
        assert all(torch.equal(out.masks[key], mask) for key, mask in plain.masks.items())


def test_the_distance_is_the_divergence_of_probabilities():
    model, batches = net(), data(2)
    masks = {"head.weight": torch.rand(40, WIDTH, generator=torch.Generator().manual_seed(0)) > 0.5}
    found = distance(model, batches, masks, {})
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.head.weight *= masks["head.weight"]
        ours, theirs = (torch.cat([m(**b) for b in batches]).reshape(-1, 40).softmax(-1) for m in (cut, model))
    assert found == pytest.approx(float((theirs * (theirs / ours).log()).sum(-1).mean()), rel=1e-5)
    assert distance(model, batches, {"head.weight": torch.ones(40, WIDTH, dtype=torch.bool)}, {}) == pytest.approx(0)


@pytest.mark.parametrize(
    "blocks",
    [
        {"reconstruct": {"epochs": 0}},
        {"reconstruct": {"lr": 0.0}},
        {"reconstruct": {"target": "input"}},
        {"reconstruct": {"speed": 1}},
        {"reconstruct": 3},
        {"allocation": "most"},
        {"allocation": {"limit": 1.5}},
        {"allocation": {"outliers": 0}},
    ],
)
def test_settings_that_mean_nothing_are_refused(blocks):
    with pytest.raises(RecipeError):
        sc.plan(
            net(),
            {"ids": torch.zeros(1, 4, dtype=torch.int64)},
            criterion="admm",
            granularity="element",
            target={"sparsity": 0.5},
            data=data(),
            blocks=blocks,
        )


def test_shares_need_one_number_and_a_pattern_that_can_differ():
    with pytest.raises(RecipeError, match="one sparsity"):
        run(net(), data(), share={"*": 0.5}, allocation=UnequalShares())
    with pytest.raises(RecipeError, match="one sparsity"):
        run(net(), data(), unit="2:4", allocation=UnequalShares())


def test_a_plan_says_what_was_done_and_its_request_holds_it():
    plan = sc.plan(
        net(),
        {"ids": torch.zeros(1, 4, dtype=torch.int64)},
        criterion="admm",
        granularity="element",
        scope="row",
        target={"sparsity": 0.5},
        data=data(),
        blocks={"reconstruct": {"epochs": 1}, "allocation": "owl"},
    )
    text = " ".join(plan.notes)
    assert "6 residual branches and 0 blocks" in text
    assert "shares of blocks by owl" in text
    asked = plan.request.to_data()["blocks"]
    assert asked["reconstruct"]["epochs"] == 1
    assert asked["allocation"]["name"] == "owl"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_an_order_statistic_finds_the_same(dtype):
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 9, (20, 15), generator=g).to(dtype)  # many alike
    drop = torch.randint(0, 15, (20,), generator=g)
    ordered = score.sort(dim=1).values
    expected = torch.stack([ordered[i, n - 1] if n else torch.tensor(-torch.inf) for i, n in enumerate(drop.tolist())])
    assert torch.equal(patterns._sorted(score, drop), expected.to(dtype))
    assert torch.equal(patterns._order_statistic(score, drop, sorted(set(drop.tolist()))), expected.to(dtype))
    keep = patterns.highest(score, drop)
    assert torch.equal((~keep).sum(1), drop)
    for row, n in enumerate(drop.tolist()):  # of equal ones the later stays
        assert torch.equal(keep[row].nonzero().flatten(), score[row].sort(stable=True).indices[n:].sort().values)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("least", [0, 4])
def test_an_order_statistic_does_not_depend_on_threads(monkeypatch, threads, least):
    g = torch.Generator().manual_seed(1)
    score = torch.randint(0, 9, (7, 12), generator=g).float()
    drop = least + torch.randint(0, 2, (7,), generator=g)
    monkeypatch.setattr(patterns, "WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(patterns._selected(score, drop, least), patterns._sorted(score, drop))


def test_hidden_states_come_back_to_the_device_they_came_from():
    from secateur.solve.blocks.hidden import HiddenStates

    store = HiddenStates(room=0)
    store.append(torch.ones(2, 3))
    assert store[0].device == torch.device("cpu")
    store._device = torch.device("meta")  # stands for any other device
    assert store[0].device == torch.device("meta")
    store.close()


def test_full_precision_is_asked_for_while_blocks_run_and_given_back():
    from secateur.solve.blocks.plainly import plainly

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with plainly(nn.Linear(1, 1)):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_estimate_knows_what_training_and_comparing_cost(monkeypatch):
    from secateur.solve.blocks import forecast

    monkeypatch.setattr(forecast, "_speed", lambda model: 1.0)
    model, example, solver = net(depth=2), {"ids": torch.zeros(1, 8, dtype=torch.int64)}, SOLVERS.find("admm")()

    def told(**settings):
        return forecast.forecast(model, example, solver, tokens=100, settings=Settings(targets="dense", **settings))

    def seconds(**settings):
        return told(**settings).seconds

    plain, two, four = seconds(), *(seconds(reconstruct=Reconstruction(epochs=n)) for n in (2, 4))
    assert four - two == 2 * forecast.TRAINED * 2.0 * told().weights * 100  # as an epoch is so many forward passes
    assert seconds(allocation=UnequalShares()) == 2 * plain
    assert seconds(allocation=UnequalShares(check=False)) == plain
    assert seconds(allocation=UnequalShares(), reconstruct=Reconstruction(epochs=2)) == 2 * plain + two
