"""What a search may choose from: read, checked before a night is spent on it, and turned into recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import FileRefusedError, RecipeError
from secateur.search.space import load_space

GOOD = """
base: channel-half-macs
criterion: [taylor, {name: magnitude, norm: l1}]
target.macs: {low: 0.2, high: 0.8}
recover.1.epochs: {low: 1, high: 4}
recover.1.optimizer.lr: {low: 0.001, high: 0.1, log: true}
allocation: [global, sensitivity]
"""


def test_a_choice_becomes_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(GOOD)
    space = load_space(tmp_path / "space.yaml")
    word = '{"name":"magnitude","norm":"l1"}'
    params = {
        "criterion": word, "target.macs": 0.333333, "recover.1.epochs": 2, "recover.1.optimizer.lr": 0.01,
        "allocation": "global",
    }  # fmt: skip
    recipe = space.recipe(params)
    assert recipe.criterion == {"name": "magnitude", "norm": "l1"}
    assert recipe.target.given() == {"macs": 0.3333}
    assert (recipe.recover[1].epochs, recipe.recover[1].optimizer.lr) == (2, 0.01)
    assert space.projected(recipe) == {**params, "target.macs": 0.3333}
    assert space.spreads_by_curves


def test_a_target_of_another_kind_takes_the_place_of_the_base_s() -> None:
    space = load_space({"target.sparsity": {"low": 0.2, "high": 0.8}})
    assert space.recipe({"target.sparsity": 0.5}).target.given() == {"sparsity": 0.5}


def test_it_starts_from_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("target: {macs: 0.6}\ncriterion: taylor\n")
    (tmp_path / "space.yaml").write_text(
        "base: own.yaml\ntarget.macs: {low: 0.2, high: 0.8}\ncriterion: [taylor, fpgm]\n"
    )
    starts = list(load_space(tmp_path / "space.yaml").starts())
    assert starts[0] == {"target.macs": 0.6, "criterion": "taylor"}
    assert {"target.macs": 0.5} in starts, "of channel-half-macs, whose criterion is none of these"


def test_it_starts_at_the_ends_and_the_middle_of_the_amounts_in_every_plain_way() -> None:
    base = {"granularity": "element", "criterion": "magnitude", "target": {"sparsity": 0.5}}
    space = load_space(
        {
            "base": base,
            "criterion": ["taylor", "magnitude"],
            "allocation": ["global", "lamp", "erk"],
            "target.sparsity": {"low": 0.36, "high": 0.99},
        }
    )
    starts = list(space.over_the_range())
    found = {(one["allocation"], round(1 - float(str(one["target.sparsity"])), 6)) for one in starts}
    # 0.64 is left, then 0.08, then 0.01: each an eighth of the one before.
    assert found == {(way, left) for way in ("global", "erk") for left in (0.64, 0.08, 0.01)}
    assert {one["criterion"] for one in starts} == {"magnitude"}, "that of the base"
    recipes = [space.recipe(one) for one in starts]
    assert len({str(recipe) for recipe in recipes}) == 6
    assert [one for one in starts if one not in list(space.starts())] == []


def test_the_middle_of_what_is_left_is_geometric() -> None:
    kept = load_space({"target.macs": {"low": 0.2, "high": 0.8}})
    assert [one["target.macs"] for one in kept.over_the_range()] == pytest.approx([0.2, 0.4, 0.8])


@pytest.mark.parametrize(
    "keys",
    [
        {"criterion": ["taylor"]},
        {"target.macs": [0.2, 0.4]},
        {"target.macs": {"low": 0.2, "high": 0.8}, "target.params": {"low": 0.2, "high": 0.8}},
    ],
)
def test_without_one_range_of_amounts_there_is_no_middle(keys: dict[str, object]) -> None:
    assert list(load_space(keys).over_the_range()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "mapping of keys"),
        ("base: channel-half-macs\n", "0 keys to choose"),
        ("criterion: magnitude\n", "list of values"),
        ("criterion: []\n", "list of values"),
        ("target.macs: {low: 0.8, high: 0.2}\n", "is no range"),
        ("target.macs: {low: 0, high: 0.2, log: true}\n", "is no range"),
        ("target.macs: {low: 0.2, high: 0.8, step: 0.1}\n", "low, high"),
        ("target.macs: {low: 0.2, high: 30}\n", "looks like a percentage"),
        ("target.flops: [0.5]\n", "write macs"),
        ("nonsense: [1, 2]\n", "unknown key"),
        ("base: no-such-recipe\ncriterion: [taylor]\n", "no-such-recipe"),
    ],
)
def test_what_no_recipe_can_be_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises((RecipeError, FileRefusedError)) as caught:
        load_space(path)
    assert words in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileRefusedError):
        load_space(tmp_path / "missing.yaml")
