"""Plans of different kinds, one after the other: composed, saved, loaded, and still the same function."""

from __future__ import annotations

import copy
import itertools
import json
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import InputError, PlanMismatchError, RecipeError
from secateur.planning.compose import composed_certificate
from secateur.planning.history import origin_of
from secateur.planning.plan import Plan
from secateur.types import Certificate


class Residual(nn.Module):
    """A block with an inner width, which numbers itself."""

    def __init__(self, index: int, width: int = 8, inner: int = 16) -> None:
        super().__init__()
        self.layer_idx = index
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Deep(nn.Module):
    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.num_layers = depth
        self.stem = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Residual(i) for i in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def deep(seed: int = 0) -> Deep:
    torch.manual_seed(seed)
    return Deep().eval()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
STEPS = {
    "layer": {"granularity": "layer", "target": {"count": 2}},
    "neuron": {"granularity": "neuron", "target": {"sparsity": 0.4}},
    "element": {"granularity": "element", "target": {"sparsity": 0.3}},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "kinds", [*itertools.permutations(STEPS, 2), *itertools.permutations(STEPS, 3), ("layer",) * 2]
)
@pytest.mark.parametrize("through_files", [False, True])
def test_any_order_of_kinds_is_one_plan(kinds, through_files, tmp_path) -> None:
    model, plan = deep(), None
    whole = copy.deepcopy(model)
    for number, kind in enumerate(kinds):
        step = sc.plan(model, X, **STEPS[kind])
        model = step.apply(model)
        if through_files:
            step.save(tmp_path / f"{number}.json")
            step = Plan.load(tmp_path / f"{number}.json")
        plan = step if plan is None else plan.then(step, whole)
    again = plan.apply(whole)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(again(X), model(X))
    assert [layer.layer_idx for layer in again.layers] == [layer.layer_idx for layer in model.layers]
    assert again.num_layers == model.num_layers
    assert (plan.certificate is None) == through_files
    reread = Plan.from_data(json.loads(plan.to_json()))
    assert reread.certificate is None
    assert "not proved here" in reread.explain()
    assert torch.equal(reread.apply(copy.deepcopy(whole))(X), model(X))
    assert reread.prove(whole, X).max_abs_error < 1e-5


def test_layers_then_cuts_equals_the_forward_written_out() -> None:
    whole = deep()
    first = sc.plan(whole, X, remove={"layers": [1, 4]}, granularity="layer")
    between = first.apply(whole)
    second = sc.plan(between, X, remove={"layers.1.up": [0, 3], "layers.3.up": [15]}, granularity="neuron")
    both = first.then(second, whole)
    assert both.groups["layers.2.up"]["removed"] == [0, 3]  # named as in the first model: 1 was 2, 3 was 5
    assert both.groups["layers.5.up"]["removed"] == [15]
    hidden = whole.stem(X)
    for i, layer in enumerate(whole.layers):
        if i not in (1, 4):
            middle = torch.relu(layer.up(hidden))
            middle[:, {2: [0, 3], 5: [15]}.get(i, [])] = 0
            hidden = hidden + layer.down(middle)
    torch.testing.assert_close(both.apply(whole)(X), whole.head(hidden))


def test_cuts_of_a_block_that_goes_later_are_forgotten() -> None:
    whole = deep()
    first = sc.plan(whole, X, remove={"layers.2.up": [0, 1]}, granularity="neuron")
    second = sc.plan(first.apply(whole), X, remove={"layers": [2]}, granularity="layer")
    both = first.then(second, whole)
    assert not any(name.startswith("layers.2.") for name in both.cuts)
    assert len(both.apply(whole).layers) == 5


def test_composed_tolerances_add_up_and_one_missing_proof_is_none() -> None:
    whole = deep()
    first = sc.plan(whole, X, **STEPS["neuron"], tolerance=1e-4)
    between = first.apply(whole)
    second = sc.plan(between, X, **STEPS["layer"], tolerance=3e-5)
    second.certify()
    assert first.then(second, whole).certificate.tolerance == pytest.approx(1.3e-4)
    bare = sc.plan(between, X, **STEPS["layer"])
    assert first.then(bare, whole).certificate is None


def test_composed_certificates_say_the_weakest_of_their_steps() -> None:
    """Proofs of steps as they might be: those of this file's models are exact, which would hide a sum."""
    first = Certificate(3e-6, 1e-5, "float64", "replay", 2)
    second = Certificate(5e-6, 2e-5, "float32", "identity", 4)
    for steps in ([first, second], [second, first]):
        whole = composed_certificate(steps)
        assert whole.max_abs_error == pytest.approx(8e-6)
        assert whole.tolerance == pytest.approx(3e-5)
        assert whole.dtype == "float32"
        assert whole.outputs == steps[-1].outputs
    assert composed_certificate([first, None]) is None
    assert composed_certificate([first]) == first


def test_a_second_round_is_saved_for_the_first_constructor(tmp_path) -> None:
    recipe = {"target": {"macs": 0.8}, "granularity": "neuron", "measure": {"latency": False}}
    sc.prune(deep(), X, recipe=recipe).save(tmp_path / "one")
    again = sc.load(tmp_path / "one", model=deep)
    layer = {"target": {"count": 1}, "granularity": "layer", "measure": {"latency": False}}
    second = sc.prune(again, X, recipe=layer)
    second.save(tmp_path / "two")
    loaded = sc.load(tmp_path / "two", model=lambda: deep(seed=5))
    assert torch.equal(loaded(X), second.model(X))
    third = sc.prune(loaded, X, recipe=recipe)
    third.save(tmp_path / "three")
    assert torch.equal(sc.load(tmp_path / "three", model=deep)(X), third.model(X))


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_round_that_was_proved_stays_proved_in_the_plan_that_is_saved(rounds, inplace) -> None:
    model, errors = deep(), []
    for _ in range(rounds):
        plan = sc.plan(model, X, granularity="neuron", target={"sparsity": 0.2}, tolerance=1e-4)
        model = plan.apply(model, inplace=inplace)
        errors.append(plan.certificate.max_abs_error)
    whole = origin_of(model)
    assert len(whole.request.earlier) == rounds - 1
    assert whole.certificate.tolerance == pytest.approx(rounds * 1e-4)
    assert whole.certificate.max_abs_error == pytest.approx(sum(errors))


def test_a_model_that_was_changed_by_hand_since_counts_as_a_first_one(tmp_path) -> None:
    recipe = {"target": {"params": 0.8}, "granularity": "neuron", "measure": {"latency": False}}
    sc.prune(deep(), X, recipe=recipe).save(tmp_path / "one")

    def with_new_parts() -> Deep:
        model = sc.load(tmp_path / "one", model=deep)
        model.layers[0], model.head = Residual(0, inner=40), nn.Linear(8, 7)
        return model

    second = sc.prune(with_new_parts(), X, recipe=recipe)
    second.save(tmp_path / "two")
    assert second.plan.request.earlier == ()
    assert torch.equal(sc.load(tmp_path / "two", model=with_new_parts)(X), second.model(X))


def test_plans_of_another_model_do_not_follow() -> None:
    whole = deep()
    first, second = (sc.plan(whole, X, **STEPS[kind]) for kind in ("neuron", "layer"))
    with pytest.raises(PlanMismatchError, match="second plan"):
        first.then(second, whole)


# -- several granularities in one ranking ----------------------------------------------------------------------


class Attention(nn.Module):
    """Heads and neurons in one block."""

    def __init__(self, width: int = 32, heads: int = 8, inner: int = 48) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        mixed = nn.functional.scaled_dot_product_attention(*(split(p(x)) for p in (self.q, self.k, self.v)))
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return self.out(x + self.down(torch.relu(self.up(x))))


def attention() -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention().eval(), torch.randn(2, 6, 32)


@pytest.mark.parametrize("words", [["head", "neuron"], "structured"])
@pytest.mark.parametrize("target", [{"macs": 0.6}, {"params": 0.5}, {"sparsity": 0.3}])
def test_one_plan_cuts_several_granularities_to_an_exact_budget(words, target) -> None:
    model, x = attention()
    plan = sc.plan(model, x, granularity=words, target=target)
    small = plan.apply(model)
    kinds = {g["granularity"] for g in plan.groups.values()}
    assert {"head", "neuron"} <= kinds
    assert plan.certificate is not None
    for what, share in target.items():
        if what in plan.cost:
            assert plan.cost[what][1] <= share * plan.cost[what][0]
    assert sum(p.numel() for p in small.parameters()) == plan.cost["params"][1]


def test_comparable_scores_are_ranked_per_unit_of_cost() -> None:
    """By hand: a head that is worth three times a neuron but costs twenty times as much goes first."""
    model, x = attention()
    view = {g.name: g for g in sc.score(model, x, granularity=["head", "neuron"]).groups}
    scores = {n: torch.full(g.shape, 3.0 if g.granularity == "head" else 1.0) for n, g in view.items()}
    plan = sc.plan(model, x, granularity=["head", "neuron"], scores=scores, target={"count": 3}, min_keep_fraction=0)
    assert {g["granularity"]: len(g["removed"]) for g in plan.groups.values() if g["removed"]} == {"head": 3}


@pytest.mark.parametrize(("comparable", "wanted"), [(True, {"a": 4, "b": 0}), (False, {"a": 2, "b": 2})])
def test_given_scores_of_another_scale_are_taken_relative_to_their_group(comparable, wanted) -> None:
    a, b = nn.Linear(4, 8), nn.Linear(8, 8)
    net = nn.Sequential(OrderedDict(a=a, b=b, out=nn.Linear(8, 2)))
    scores = {"a": torch.arange(1.0, 9.0), "b": 100 * torch.arange(1.0, 9.0)}
    plan = sc.plan(
        net, torch.zeros(1, 4), granularity="neuron", scores=scores, target={"count": 4}, comparable=comparable
    )  # fmt: skip
    assert {name: len(group["removed"]) for name, group in plan.groups.items()} == wanted


@pytest.mark.parametrize("words", [["head", "layer"], ["channel", "element"], ["element", "2:4"], ["expert", "head"]])
def test_kinds_that_cannot_be_ranked_together_say_what_to_do(words) -> None:
    model, x = attention()
    with pytest.raises(RecipeError, match=r"then\(second"):
        sc.plan(model, x, granularity=words, target={"sparsity": 0.3})


# -- given scores, units, masks ---------------------------------------------------------------------------------


def test_scores_select_and_plan_are_one_chain_for_every_granularity() -> None:
    model, x = attention()
    for kind in ("neuron", "head"):
        keep = sc.select(sc.score(model, x, granularity=kind), sparsity=0.25)
        plan = sc.plan(model, x, granularity=kind, keep=keep)
        assert {n: g["removed"] for n, g in plan.groups.items()} == {
            n: (~mask).nonzero().flatten().tolist() for n, mask in keep.items()
        }
        plan.apply(model)
    for kind in ("element", "vector", "block", "2:4", "neuron", "head"):
        scores = sc.score(model, x, granularity=kind)
        keep = sc.select(scores, **({} if kind == "2:4" else {"sparsity": 0.25}), granularity=kind)
        masked = copy.deepcopy(model)
        sc.mask_model(masked, keep)
        zeros = sum(int((p == 0).sum()) for p in masked.parameters())
        assert zeros > 0, kind


def test_masked_channels_give_what_the_cut_gives() -> None:
    model, x = attention()
    keep = sc.select(sc.score(model, x, granularity="neuron"), sparsity=0.25)
    cut = sc.plan(model, x, granularity="neuron", keep=keep).apply(model)
    masked = copy.deepcopy(model)
    sc.mask_model(masked, keep)
    torch.testing.assert_close(masked(x), cut(x))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("units", [3, 45, 50, 101])
def test_select_and_plan_remove_the_same_number(share, units) -> None:
    from decimal import ROUND_HALF_UP, Decimal

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 2)), torch.randn(2, 4)
    wanted = int((Decimal(str(share)) * units).to_integral_value(ROUND_HALF_UP))
    plan = sc.plan(model, x, granularity="neuron", target={"sparsity": share}, scope="local")
    keep = sc.select(sc.score(model, x, granularity="neuron"), sparsity=share)
    assert plan.units["removed"] == sum(int((~mask).sum()) for mask in keep.values()) == wanted


def test_given_masks_are_written_as_they_are() -> None:
    model, _ = attention()
    mask = torch.rand(model.up.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    plan = sc.plan(model, masks={"up.weight": mask})
    masked = plan.apply(model)
    assert torch.equal(masked.up.weight, torch.where(mask, model.up.weight, 0.0))
    assert plan.units["removed"] == int((~mask).sum())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"remove": {"up": [48]}}, "no unit 48"),
        ({"remove": {"upp": [0]}}, "up"),
        ({"remove": {"up": list(range(48))}}, "all its 48 units"),
        ({"remove": {"out": [0]}}, "locked"),
        ({"keep": {"up": torch.ones(3, dtype=torch.bool)}}, r"not bool \(48,\)"),
        ({"scores": {"up": torch.ones(3)}, "target": {"count": 1}}, r"not float \(48,\)"),
        ({"scores": {"up": torch.full((48,), torch.nan)}, "target": {"count": 1}}, "NaN"),
        ({"masks": {"up.weight": torch.ones(2, dtype=torch.bool)}}, r"shape \(2,\), not \(48, 32\)"),
        ({"masks": {"up.wait": torch.ones(2, dtype=torch.bool)}}, "up.weight"),
    ],
)
def test_given_units_that_do_not_fit_are_refused(arguments, text) -> None:
    model, x = attention()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=text):
        sc.plan(model, x, granularity="neuron", **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"keep": {}, "remove": {}},
        {"remove": {"up": [0]}, "target": {"count": 1}},
        {"masks": {}, "target": {"count": 1}},
    ],
)
def test_two_answers_to_what_goes_or_none_are_refused(arguments) -> None:
    model, x = attention()
    with pytest.raises(RecipeError):
        sc.plan(model, x, granularity="neuron", **arguments)


# -- amounts per pattern ----------------------------------------------------------------------------------------


def test_amounts_per_pattern_are_exact_for_every_set() -> None:
    model = deep()
    target = {"sparsity": {"layers.0.*": 0.25, "layers.[12].*": 0.5, "*": 0}}
    plan = sc.plan(model, X, granularity="neuron", target=target)
    gone = {name: len(group["removed"]) for name, group in plan.groups.items()}
    assert gone["layers.0.up"] == 4
    assert gone["layers.1.up"] + gone["layers.2.up"] == 16
    assert sum(gone.values()) == 20


def test_a_pattern_that_matches_nothing_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="encoder"):
        sc.plan(deep(), X, granularity="neuron", target={"sparsity": {"encoder.*": 0.3, "*": 0.5}})
    with pytest.raises(RecipeError):
        sc.plan(deep(), X, granularity="neuron", target={"sparsity": {"*": 0.5}, "macs": 0.5})


# -- one validation ---------------------------------------------------------------------------------------------

WRONG = [
    {"count": 2.5}, {"macs": "0.5"}, {"macs": 2}, {"macs": 50}, {"params": 1.5}, {"macs": float("nan")}, {"macs": -1},
    {"sparsity": 0.5, "count": 3}, {"count": True}, {"macs": True}, {"sparsity": "0.5"}, {"sparsity": "50%"},
    {"sparsity": 1}, {"flops": 0.5}, {}, {"latency_ms": 0}, {"memory_bytes": 0}, {"sparsity": {"*": 50}},
    {"macs": {"*": 0.5}},
]  # fmt: skip


@pytest.mark.parametrize("target", WRONG, ids=str)
@pytest.mark.parametrize("granularity", ["neuron", "element", "layer"])
def test_python_and_recipe_refuse_the_same_targets(target, granularity) -> None:
    model = deep()
    with pytest.raises(RecipeError):
        sc.plan(model, X, granularity=granularity, target=target)
    with pytest.raises(RecipeError):
        sc.load_recipe({"target": target, "granularity": granularity})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target": 0.5}, "macs"),
        ({"protect": [nn.Linear(1, 1)]}, "not in the model"),
        ({"protect": [3]}, "no name"),
        ({"protect": "fc1"}, "one word"),
        ({"scope": "globl"}, "scope"),
        ({"min_keep": -1}, "min_keep"),
        ({"min_keep_fraction": 1.5}, "min_keep_fraction"),
        ({"round_to": 0}, "round_to"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_bad_keywords_are_one_clear_error(arguments, text) -> None:
    with pytest.raises(RecipeError, match=text):
        sc.plan(deep(), X, **{"granularity": "neuron", "target": {"sparsity": 0.5}, **arguments})


# -- floors and grids -------------------------------------------------------------------------------------------


def two_layers(first: int = 45, second: int = 64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2))
    return model, torch.randn(3, 4)


@pytest.mark.parametrize(("fraction", "least"), [(0.1, 5), (0.2, 9), (0.0, 1), (0.5, 23)])
def test_a_global_ranking_keeps_a_share_of_every_group_rounded_up(fraction, least) -> None:
    """Scores that would empty the first group: 45 units keep ceil(45 f)."""
    model, x = two_layers()
    scores = {"0": torch.full((45,), 1e-6), "2": torch.ones(64)}
    options = {"granularity": "neuron", "scores": scores, "min_keep_fraction": fraction, "round_to": 1}
    plan = sc.plan(model, x, target={"count": 45 - least}, **options)
    assert 45 - len(plan.groups["0"]["removed"]) == least
    assert plan.groups["2"]["removed"] == []
    more = sc.plan(model, x, target={"count": 45 - least + 1}, **options)
    assert 45 - len(more.groups["0"]["removed"]) == least


def test_scores_without_a_common_scale_are_compared_by_their_mean_size() -> None:
    """Signed scores whose mean is near zero: dividing by it would turn the ranking over."""
    from secateur.planning.decide import relative_scores

    score = torch.tensor([-3.0, 3.01, 1.0, -1.0])
    torch.testing.assert_close(relative_scores(score), score / (8.01 / 4))
    assert torch.equal(relative_scores(torch.zeros(3)), torch.zeros(3))


def test_widths_are_multiples_of_eight_under_a_bound_and_exact_where_exactness_is_asked() -> None:
    model, x = two_layers(40, 96)
    bound = sc.plan(model, x, granularity="neuron", target={"params": 0.5})
    kept = {n: g["size"] - len(g["removed"]) for n, g in bound.groups.items()}
    assert kept["2"] % 8 == 0
    assert bound.cost["params"][1] <= 0.5 * bound.cost["params"][0]
    exact = sc.plan(model, x, granularity="neuron", target={"count": 37})
    assert exact.units["removed"] == 37
    assert (
        sc.plan(model, x, granularity="neuron", target={"params": 0.5}, round_to=1).cost["params"][1]
        > (bound.cost["params"][1])
    )


def test_bytes_count_the_buffers_of_blocks() -> None:
    class Buffered(Residual):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.register_buffer("table", torch.zeros(1000))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table[0]

    model = deep()
    model.layers = nn.ModuleList(Buffered(i) for i in range(4))
    whole = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    block = whole - sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if ".0." not in n)
    plan = sc.plan(model, X, granularity="layer", target={"memory_bytes": whole - 2 * block})
    assert len(plan.groups["layers"]["removed"]) == 2


@pytest.mark.parametrize("min_keep", [0, 1, 3])
def test_masks_keep_the_units_that_are_promised(min_keep) -> None:
    model, _ = two_layers()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    plan = sc.plan(model, granularity="element", target={"sparsity": 0.5}, min_keep=min_keep)
    assert int(plan.masks["0.weight"].sum()) == min_keep
    assert plan.units["removed"] == round(0.5 * plan.units["total"])
    keep = sc.select(sc.score(model), sparsity=0.5, min_keep=min_keep)
    assert all(torch.equal(keep[name], mask) for name, mask in plan.masks.items())
