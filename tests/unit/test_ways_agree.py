"""What can be said in several ways means the same in each: solvers, scores, masks, keywords, recipe, command line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.asking import Decided
from secateur.cli.decisions import Decisions
from secateur.cli.job import read_recipe
from secateur.errors import FileRefusedError, InputError, RecipeError, UnsupportedError
from secateur.kinds.weights import parse
from secateur.model.admit import WrapperWarning
from secateur.request import Named, Request, Target
from secateur.solve.blocks.products import WHOLE
from secateur.solve.blocks.sites import Matrix, patterns_of
from secateur.tickets import masks as tickets
from secateur.training import MovementPruner, Pruner
from secateur.training.penalties import penalty

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
QUICK = {"overrides": ["measure.latency=false"]}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


# -- one rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("shapes", [[(9, 5)], [(3, 3), (5, 7), (1, 1)]], ids=str)
@pytest.mark.parametrize(("granularity", "scope"), [("element", "local"), ("element", "row"), ("block", "local")])
def test_a_solver_counts_as_select_does(
    granularity: str, scope: str, shapes: list[tuple[int, int]], sparsity: float
) -> None:
    asked = {"name": "block", "shape": [1, 1]} if granularity == "block" else granularity
    request = Request(target=Target(sparsity=sparsity), granularity=(Named.of(asked),), scope=scope)
    matrices = [Matrix((f"{i}.weight", WHOLE), shape, turned=False) for i, shape in enumerate(shapes)]
    units = sum(rows * columns for rows, columns in shapes)
    wanted = int((Decimal(str(sparsity)) * units).to_integral_value(ROUND_HALF_UP))
    scores = {f"{i}": torch.rand(shape) for i, shape in enumerate(shapes)}
    assert sum(int((~kept).sum()) for kept in sc.select(scores, sparsity=sparsity).values()) == wanted
    for shares in (None, {matrix.site: sparsity for matrix in matrices}):
        found = patterns_of(matrices, parse(asked), request, shares)
        assert sum(found[matrix.site].removed(matrix.shape) for matrix in matrices) == wanted


# -- a pattern means itself ----------------------------------------------------------------------------------------


def kept_of_each_four(masks: Mapping[str, Tensor]) -> set[int]:
    return {n for mask in masks.values() for n in mask.reshape(-1, 4).sum(1).tolist()}


@pytest.mark.parametrize(("pattern", "kept", "sparsity"), [("2:4", 2, 0.5), ("1:4", 1, 0.75)])
def test_scores_of_a_pattern_give_the_pattern(pattern: str, kept: int, sparsity: float) -> None:
    scores = sc.score(net(), granularity=pattern)
    for masks in (
        sc.select(scores),
        sc.select(scores, sparsity=sparsity),
        sc.select(scores, granularity=pattern),
        sc.plan(net(), granularity=pattern, scores=scores).masks,
        sc.plan(net(), granularity=pattern).masks,
    ):
        assert kept_of_each_four(masks) == {kept}
    with pytest.raises(RecipeError, match="fixes the sparsity"):
        sc.select(scores, sparsity=0.3)
    # Whoever names other units means them: the scores are those of single weights.
    free = sc.select(scores, granularity="element", count=3)
    assert sum(int((~mask).sum()) for mask in free.values()) == 3


def test_the_command_line_takes_a_pattern_without_a_target() -> None:
    for word, sparsity in (("2:4", 0.5), ("1:4", 0.75), ("semi_structured", 0.5)):
        for found in (
            read_recipe(None, None, None, Decisions(granularity=word)),
            read_recipe(None, [f'granularity="{word}"'], None),
        ):
            assert found.target.given() == {"sparsity": sparsity}
            assert sc.plan(net(), granularity=word).request.target == Target.of(found.target.given())
    # A target that somebody asked for is not replaced, nor that of a recipe that was named: one of cuts is refused.
    for changes in (["target.sparsity=0.5"], ["target={sparsity: 0.5}"], [" target.sparsity = 0.5"]):
        assert read_recipe(None, ['granularity="1:4"', *changes], None).target.given() == {"sparsity": 0.5}
    for asked in (
        lambda: read_recipe(None, None, None, Decisions(granularity="2:4", macs="0.3")),
        lambda: read_recipe("channel-half-macs", ['granularity="2:4"'], None),
    ):
        with pytest.raises(RecipeError, match="'macs' does not apply to masks"):
            asked()


# -- masks, as a plan and as zeros at once -------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(x)))
        return out


def test_masks_of_a_tied_weight_count_once() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(8, 8) > 0.5, torch.rand(8, 8) > 0.5
    masks = {"a.weight": first, "b.weight": second}
    plan = sc.plan(Tied(), masks=masks)
    gone = int((~(first & second)).sum())
    assert (plan.units["removed"], plan.units["total"]) == (gone, 64)
    assert list(plan.masks) == ["a.weight"]
    masked, alone = Tied(), sc.plan(Tied(), masks={"b.weight": second})
    sc.mask_model(masked, masks)
    for model in (plan.apply(Tied()), masked):
        assert torch.equal(model.get_parameter("a.weight") != 0, first & second)
    assert torch.equal(alone.masks["a.weight"], second)


@pytest.mark.parametrize(
    "mask", [[[True] * 8] * 16, np.ones((16, 8), bool), torch.ones(16, 8), torch.ones(8, 16) > 0, torch.ones(16) > 0]
)
def test_a_wrong_mask_is_refused_alike(mask: object) -> None:
    said = []
    for ask in (sc.mask_model, lambda model, masks: sc.plan(model, masks=masks)):
        with pytest.raises(InputError, match=r"mask of '0.weight'") as caught:
            ask(net(), {"0.weight": mask})  # type: ignore[dict-item]
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_plan_of_masks_does_not_change_with_them() -> None:
    mask = torch.ones(16, 8, dtype=torch.bool)
    plan = sc.plan(net(), masks={"0.weight": mask})
    mask.zero_()
    assert bool(plan.masks["0.weight"].all())
    row = torch.arange(16).view(16, 1) > 3  # of size 1: for every input
    assert int((~sc.plan(net(), masks={"0.weight": row}).masks["0.weight"]).sum()) == 4 * 8


class Constant(sc.criteria.Magnitude):
    """The same score for every weight, masked ones included."""

    value = 0.0

    def score(self, context):  # type: ignore[no-untyped-def]
        return {name: torch.full_like(found, self.value) for name, found in super().score(context).items()}


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 2.0**24, 1e9, -1e9, 1e30])
def test_a_ticket_never_takes_a_masked_weight_back(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Constant, "value", value)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    before = {"0.weight": torch.ones(4, 4, dtype=torch.bool)}
    before["0.weight"][3, 2:] = False  # the last of equal scores: they would be the last to go
    after = tickets.next_masks(
        model, before, 3 / 16, criterion=Constant(), scope="global", protect=(), data=None, loss=None, seed=0
    )["0.weight"]
    assert int((~after).sum()) == 3
    assert not after[3, 2:].any()


# -- one set of words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protect", [lambda m: [m[0]], lambda m: [m[0].weight], lambda m: ["0"]])
def test_pruners_protect_what_plans_protect(protect) -> None:  # type: ignore[no-untyped-def]
    model = net()
    planned = sc.plan(model, target={"sparsity": 0.5}, protect=protect(model))
    pruner = Pruner(model, sparsity=0.5, schedule="one_shot", protect=protect(model))
    pruner.finish()
    touched = {name for name, mask in pruner.masks.items() if not mask.all()}
    assert touched == set(planned.masks) == {"2.weight", "4.weight"}
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moving = MovementPruner(model, sparsity=0.5, end=3, optimizer=optimizer, protect=protect(model))
    moving.finish()
    assert set(moving.masks) == {"2.weight", "4.weight"}
    assert set(penalty("l1", model, strength=1.0, protect=protect(model)).paying) == {"2.weight", "4.weight"}


@pytest.mark.parametrize("made", [Pruner, MovementPruner])
@pytest.mark.parametrize("name", ["ignored_layers", "importance", "pruning_ratio", "protct"])
def test_an_unknown_argument_of_a_pruner_is_answered(made: type, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"{made.__name__}\(\) has no argument '{name}'") as caught:
        made(net(), **{name: 0.5})
    with pytest.raises(RecipeError) as planned:
        sc.plan(net(), **{name: 0.5})  # type: ignore[arg-type]
    assert caught.value.hint == planned.value.hint


# -- prune takes what plan takes -----------------------------------------------------------------------------------


def test_prune_has_every_keyword_of_plan() -> None:
    known = {*inspect.signature(sc.prune).parameters, *Decided.__annotations__}
    assert set(inspect.signature(sc.plan).parameters) <= known


KEPT = {"0": torch.arange(16) % 4 != 1}
SCORES = {name: torch.rand(16, generator=torch.Generator().manual_seed(2)) for name in ("0", "2")}
BY_HAND = {
    "keep": {"keep": KEPT},
    "remove": {"remove": {"0": [1, 5], "2": [3]}},
    "masks": {"masks": {"0.weight": torch.arange(128).view(16, 8) % 3 > 0}},
    "scores": {"scores": SCORES, "target": {"sparsity": 0.3}},
    "scores, not comparable": {"scores": SCORES, "comparable": False, "target": {"macs": 0.6}},
    "a part of the scores": {"scores": {"2": SCORES["2"]}, "target": {"count": 3}},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_prune_and_estimate_decide_by_hand_as_plan_does(name: str, tmp_path: Path) -> None:
    asked = {"granularity": "neuron", **BY_HAND[name]}
    plan = sc.plan(net(), X, **asked)  # type: ignore[arg-type]
    result = sc.prune(net(), X, **asked, **QUICK)  # type: ignore[arg-type]
    told = sc.estimate(net(), X, **asked, **QUICK)  # type: ignore[arg-type]
    wanted = plan.apply(net())(X)
    for found in (result, told):
        assert plan.diff(found.plan) == ""
        assert found.report.target == ({} if plan.request.target is None else plan.request.target.flat())
        assert any("no recipe holds" in warning for warning in found.report.warnings)
    assert torch.equal(result.model(X), wanted)
    assert result.report.status == "ok"
    loaded = sc.load(result.save(tmp_path / "out"), net())
    assert torch.equal(loaded(X), wanted)


def test_what_is_decided_twice_is_refused() -> None:
    for name in ("keep", "remove", "masks"):
        for ask in (sc.plan, sc.prune, sc.estimate):
            with pytest.raises(RecipeError, match="exactly"):
                ask(net(), X, granularity="neuron", target={"macs": 0.5}, **BY_HAND[name])  # type: ignore[arg-type]
    training = {"target": {"sparsity": 0.5}, "training": {"method": "gradual", "steps": 2}}
    data = [(X, torch.zeros(4, dtype=torch.long))]
    with pytest.raises(RecipeError, match="both decide"):
        sc.prune(net(), X, data=data, recipe=training, granularity="neuron", remove={"0": [1]})


def test_a_run_by_hand_goes_on_by_the_same_call_alone(tmp_path: Path) -> None:
    asked = {"granularity": "neuron", "checkpoint": tmp_path / "run", **QUICK}
    first = sc.prune(net(), X, **asked, **BY_HAND["scores"])  # type: ignore[arg-type]
    again = sc.prune(net(), X, **asked, **BY_HAND["scores"])  # type: ignore[arg-type]
    assert first.plan.to_json() == again.plan.to_json()
    for other in (BY_HAND["remove"], BY_HAND["a part of the scores"]):
        with pytest.raises(FileRefusedError):
            sc.prune(net(), X, **asked, **other)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="call prune again"):
        sc.resume(tmp_path / "run", net(), X)


def test_a_recipe_without_a_target_takes_the_keywords() -> None:
    recipe = {"recover": [], "measure": {"latency": False}}
    for target in ({"sparsity": 0.25}, Target(sparsity=0.25)):
        result = sc.prune(net(), X, granularity="neuron", target=target, recipe=recipe)
        assert result.recipe.target.given() == {"sparsity": 0.25}
    with pytest.raises(RecipeError, match="target"):
        sc.prune(net(), X, granularity="neuron", recipe=recipe)


def test_blocks_is_a_keyword_of_both() -> None:
    asked = {"granularity": "element", "criterion": "wanda", "scope": "row", "target": {"sparsity": 0.5}}
    data = [X]
    for blocks in (True, {"hold_out": 0.0}):
        plan = sc.plan(net(), X, data=data, blocks=blocks, **asked)  # type: ignore[arg-type]
        result = sc.prune(net(), X, data=data, blocks=blocks, recover=[], **asked, **QUICK)  # type: ignore[arg-type]
        assert plan.diff(result.plan) == ""
        assert plan.request.blocks == result.plan.request.blocks


def test_an_estimate_says_what_a_run_would_doubt() -> None:
    wrapped = nn.DataParallel(net())
    asked = {"granularity": "neuron", "target": {"sparsity": 0.5}, **QUICK}
    with pytest.warns(WrapperWarning):
        told = sc.estimate(wrapped, X, **asked)  # type: ignore[arg-type]
    with pytest.warns(WrapperWarning):
        done = sc.prune(wrapped, X, recover=[], **asked)  # type: ignore[arg-type]
    assert told.report.warnings
    assert set(told.report.warnings) >= {one for one in done.report.warnings if "training data" not in one}


WRONG = [True, "0.5", "50%", float("nan"), float("inf"), -1, 1.5, 50, [0.5], {"*": 50}, {"*": "half"}]


@pytest.mark.parametrize("name", ["sparsity", "count"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_select_and_plan_answer_a_wrong_amount_in_the_same_words(name: str, value: object) -> None:
    asked = {name: value}
    if name == "count" and value in (50, {"*": 50}):
        return  # a count that there is
    with pytest.raises(RecipeError) as planned:
        sc.plan(net(), granularity="element", target=asked)  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as selected:
        sc.select(sc.score(net(), granularity="element"), **asked)  # type: ignore[arg-type]
    said = planned.value.what.removeprefix("target: ")
    assert selected.value.what == said.replace(f"{name} of '*': ", "")


def test_a_pattern_and_another_amount_are_one_sentence() -> None:
    asked = {"granularity": "2:4", "target": {"sparsity": 0.7}}
    scores = sc.score(net(), granularity="2:4")
    ways = (
        lambda: sc.plan(net(), **asked),  # type: ignore[arg-type]
        lambda: sc.plan(net(), X, data=[X], criterion="sparsegpt", **asked),  # type: ignore[arg-type]
        lambda: sc.select(scores, sparsity=0.7),
        lambda: Pruner(net(), granularity="2:4", sparsity=0.7, schedule="one_shot").finish(),
    )
    said = set()
    for ask in ways:
        with pytest.raises(RecipeError) as caught:
            ask()
        said.add(str(caught.value))
    assert len(said) == 1


class TwoWays(nn.Module):
    """Goes another way with a second argument, whose width every unit is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden if more is None else hidden + more)


@pytest.mark.parametrize("entry", ["plan", "prune", "estimate"])
def test_what_a_further_example_needs_stays_for_every_entry(entry: str) -> None:
    torch.manual_seed(0)
    model = TwoWays()
    run = getattr(sc, entry)
    quick = {} if entry == "plan" else QUICK
    free = run(model, X, target={"sparsity": 0.5}, **quick)
    assert (free if entry == "plan" else free.plan).units["removed"] > 0
    with pytest.raises(UnsupportedError, match="Nothing") as caught:
        run(model, X, examples=[(X, torch.randn(4, 16))], target={"sparsity": 0.5}, **quick)
    assert "a dimension of the model's input" in caught.value.why  # the 16 of the second argument
