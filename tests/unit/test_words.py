"""The words of other tools: understood or answered, alike in Python, recipe and command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import criteria, words
from secateur.cli.job import read_recipe
from secateur.errors import RecipeError
from secateur.kinds.find import KINDS, STRUCTURED
from secateur.kinds.weights import parse
from secateur.kinds.weights.granularity import STRUCTURAL
from secateur.model.protect import patterns_of
from secateur.recipe import Recipe, load_recipe
from secateur.request import TARGETS, granularities

X = torch.zeros(1, 4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def plan(**changes: object) -> sc.Plan:
    return sc.plan(net(), X, **{"granularity": "neuron", "target": {"sparsity": 0.5}, **changes})  # type: ignore[arg-type]


def known_granularity(name: str) -> bool:
    return name in KINDS or name in STRUCTURAL or name == STRUCTURED


def test_every_word_means_something_that_there_is() -> None:
    for meant in words.CRITERIA.values():
        options = {key: value for key, value in meant.items() if key != "name"}
        assert criteria.get(str(meant["name"]), options).name == meant["name"]
    for word, meant in words.GRANULARITIES.items():
        assert known_granularity(str(meant["name"])) or parse(dict(meant)).name
        assert not known_granularity(word), word
        assert word not in criteria.names()
    assert not set(words.CRITERIA) & set(criteria.names())
    assert not set(words.ABOUT_CRITERIA) & {*criteria.names(), *words.CRITERIA}
    assert not set(words.ABOUT_GRANULARITIES) & {*STRUCTURAL, *words.GRANULARITIES}
    assert not set(words.ABOUT_TARGETS) & set(TARGETS)
    assert words.TARGETS == TARGETS
    assert not set(words.ABOUT_KEYS) & set(Recipe.model_fields)


@pytest.mark.parametrize("word", words.GRANULARITIES)
def test_a_granularity_is_understood_everywhere(word: str) -> None:
    meant = words.GRANULARITIES[word]
    (choice,) = granularities(word)
    assert choice.name == meant["name"]
    written = load_recipe({"target": {"sparsity": 0.5}, "granularity": word}).granularity
    assert (written["name"] if isinstance(written, dict) else written) == meant["name"]
    assert read_recipe(None, [f'granularity="{word}"'], None).granularity == written


@pytest.mark.parametrize("word", words.CRITERIA)
def test_a_criterion_is_understood_everywhere(word: str) -> None:
    meant = dict(words.CRITERIA[word])
    rule = criteria.get(word)
    assert rule.name == meant["name"]
    assert all(rule.options()[key] == value for key, value in meant.items() if key != "name")
    written = load_recipe({"target": {"sparsity": 0.5}, "criterion": word}).criterion
    assert written == (meant if len(meant) > 1 else meant["name"])


def test_the_same_plan_by_either_word() -> None:
    ours = plan(criterion={"name": "magnitude", "norm": "l1"})
    assert plan(criterion="l1").to_json() == ours.to_json()
    assert plan(criterion={"name": "l1", "reduce": "sum"}).to_json() == ours.to_json()
    assert plan(granularity="neurons", criterion="l1").to_json() == ours.to_json()
    masks = [sc.plan(net(), granularity=word, target={"sparsity": 0.5}) for word in ("element", "unstructured")]
    assert masks[0].to_json() == masks[1].to_json()


@pytest.mark.parametrize(("given", "word"), [*words.ABOUT_CRITERIA.items(), ("magnitud", "magnitude")])
def test_a_criterion_that_could_mean_two_things_is_answered(given: str, word: str) -> None:
    for ask in (lambda: plan(criterion=given), lambda: read_recipe(None, [f"criterion={given}"], None)):
        with pytest.raises(RecipeError) as caught:
            ask()
        assert word in caught.value.hint


def test_an_unknown_criterion_names_where_all_are_listed() -> None:
    with pytest.raises(RecipeError, match="secateur criteria list"):
        plan(criterion="zzzz")


@pytest.mark.parametrize(("given", "answer"), words.ABOUT_GRANULARITIES.items())
def test_a_granularity_that_could_mean_two_things_is_answered(given: str, answer: str) -> None:
    for ask in (lambda: plan(granularity=given), lambda: read_recipe(None, [f'granularity="{given}"'], None)):
        with pytest.raises(RecipeError) as caught:
            ask()
        assert caught.value.hint == answer


@pytest.mark.parametrize(("given", "answer"), words.ABOUT_TARGETS.items())
def test_a_target_is_answered(given: str, answer: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(target={given: 0.5})
    assert caught.value.hint == answer
    if given == given.lower():
        with pytest.raises(RecipeError) as caught:
            load_recipe({"target": {given: 0.5}})
        assert answer in str(caught.value)


@pytest.mark.parametrize("name", ["ignored_layers", "pruning_ratio", "importance", "macs", "flops", "example_inputs"])
def test_an_argument_or_key_is_answered(name: str) -> None:
    answer = words.about_key(name)
    assert answer.startswith(("write", "macs"))
    functions = (plan, lambda **o: sc.prune(net(), X, **o), lambda **o: sc.inspect(net(), X, **o))
    for function in functions:
        with pytest.raises(RecipeError) as caught:
            function(**{name: 0.5})
        assert caught.value.hint == answer
    with pytest.raises(RecipeError) as caught:
        load_recipe({"target": {"macs": 0.5}, name: 0.5})
    assert answer in str(caught.value)


@pytest.mark.parametrize("function", [sc.plan, sc.prune, sc.estimate, sc.score, sc.inspect, sc.select, sc.load])
def test_a_misspelt_argument_is_one_clear_error(function: object) -> None:
    with pytest.raises(RecipeError, match="has no argument 'protct'"):
        function(None, None, protct=1)  # type: ignore[operator]


def test_modules_parameters_and_classes_are_protected() -> None:
    model = net()
    by_name = sc.plan(model, X, granularity="neuron", target={"sparsity": 0.3}, protect=["0"])
    for given in ([model[0]], [model[0].weight], (model[0],)):
        found = sc.plan(model, X, granularity="neuron", target={"sparsity": 0.3}, protect=given)
        assert found.groups == by_name.groups
    assert patterns_of(model, [nn.ReLU, model[4], "0.*"]) == ("type:ReLU", "4", "0.*")
    result = sc.prune(model, X, granularity="neuron", target={"sparsity": 0.3}, protect=[model[0]])
    assert result.model[0].out_features == 8
    assert result.recipe.protect == ("0",)
    assert {group.name for group in sc.inspect(model, X, protect=[model[0]]).groups} == {"2"}


@pytest.mark.parametrize(
    ("protect", "said"),
    [
        ([nn.Linear(2, 2)], "not in the model"),
        ("fc1", "one word"),
        ([3], "no name: int"),
        (7, "no name"),
    ],
)
def test_what_cannot_be_protected_is_refused_everywhere(protect: object, said: str) -> None:
    calls = (
        lambda: plan(protect=protect),
        lambda: sc.inspect(net(), X, protect=protect),  # type: ignore[arg-type]
        lambda: sc.score(net(), X, protect=protect),  # type: ignore[arg-type]
        lambda: sc.prune(net(), X, target={"macs": 0.5}, protect=protect),  # type: ignore[typeddict-item]
        lambda: sc.advise(net(), X, protect=protect),  # type: ignore[arg-type]
    )
    for ask in calls:
        with pytest.raises(RecipeError, match=said):
            ask()
    with pytest.raises(RecipeError, match="one word" if isinstance(protect, str) else "no name"):
        sc.select({"a": torch.rand(4)}, sparsity=0.5, protect=protect)  # type: ignore[arg-type]


def test_the_whole_model_is_no_part_of_itself() -> None:
    model = net()
    with pytest.raises(RecipeError, match="the whole model"):
        sc.plan(model, X, target={"macs": 0.5}, protect=[model])
