"""A choice that nothing reads is refused, and one that is not refused makes another plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.asking import settings_of
from secateur.errors import RecipeError, TargetError
from secateur.model.door import Parts
from secateur.planning.unread import HOLDS, USUAL
from secateur.recipe import load_recipe
from secateur.request import Named
from secateur.training import Pruner

OTHER: dict[str, Any] = {
    "allocation": "uniform", "min_keep": 50, "min_keep_fraction": 0.8, "round_to": 8, "scales": "follow",
    "expressible": True, "proof": "full", "dtype": "float64", "tolerance": 0.125,
}  # fmt: skip
CUTS = {"min_keep_fraction", "round_to", "scales", "proof", "dtype", "tolerance"}
# By hand, from what each of them is for.
UNREAD: dict[str, set[str]] = {
    "channel": set(),
    "local": {"min_keep_fraction"},  # it is a floor under one ranking of all, and there is none
    "uniform": {"min_keep_fraction"},
    "layer": {"min_keep_fraction", "scales"},  # no width changes
    "element": CUTS,
    "2:4": CUTS | {"allocation", "min_keep"},  # two of four, whatever else is said
    "solver": CUTS | {"allocation", "min_keep", "expressible"},
}
# Refused for masks in other words; and of one share for each group both words say the same.
ELSEWHERE = {("expressible", "element"), ("expressible", "2:4"), ("allocation", "local"), ("allocation", "uniform")}


class Block(nn.Module):
    """With a path around it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What it adds, and what came."""
        added: torch.Tensor = self.down(self.up(x).relu())
        return x + added


class Stacks(nn.Module):
    """Two stacks of blocks, of which nearly every weight is larger than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList(Block() for _ in range(3)) for _ in range(2))
        for number, weight in enumerate(self.parameters()):
            weight.data *= 1.2**number
        for weight in self.first[2].parameters():  # so that of its stack two are small beside the mean
            weight.data *= 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        for block in (*self.first, *self.second):
            x = block(x)
        return x


def asked(kind: str) -> dict[str, Any]:
    data = [torch.randn(4, 8) for _ in range(2)]
    found: dict[str, dict[str, Any]] = {
        "local": {"scope": "local"},
        "uniform": {"allocation": "uniform"},
        "layer": {"granularity": "layer"},
        "element": {"granularity": "element"},
        "2:4": {"granularity": "2:4"},
        "solver": {"granularity": "element", "criterion": "sparsegpt", "scope": "row", "data": data},
    }
    return found.get(kind, {})


@pytest.mark.parametrize("kind", UNREAD)
@pytest.mark.parametrize("name", OTHER)
def test_refused_or_another_plan(kind: str, name: str) -> None:
    torch.manual_seed(0)
    model, example = Stacks(), torch.randn(2, 8)
    usual: dict[str, Any] = {"target": {"sparsity": 0.5 if kind == "2:4" else 0.3}, **asked(kind)}
    if (name, kind) in ELSEWHERE:
        return
    if name in UNREAD[kind]:
        with pytest.raises(RecipeError, match=rf"{name}: .* would have no effect"):
            sc.plan(model, example, **usual, **{name: OTHER[name]})
        return
    if name in ("scales", "expressible"):  # that they are read shows on models that have such scales and configs
        return
    first = sc.plan(model, example, **usual)
    try:
        other = sc.plan(model, example, **usual, **{name: OTHER[name]})
    except TargetError:  # it keeps so much that the target is out of reach
        return
    if name in ("proof", "dtype", "tolerance"):
        first.certify()
        other.certify()
        before, after = (getattr(one.certificate, "effort" if name == "proof" else name) for one in (first, other))
        assert before != after == OTHER[name]
    else:
        assert first.groups != other.groups or any(not torch.equal(m, other.masks[n]) for n, m in first.masks.items())


@pytest.mark.parametrize(("name", "value"), HOLDS.items())
def test_what_asks_for_nothing_is_kept_to(name: str, value: object) -> None:
    usual: dict[str, Any] = {"target": {"sparsity": 0.5}, "granularity": "2:4"}
    first, other = (sc.plan(Stacks(), torch.randn(2, 8), **more) for more in (usual, {**usual, name: value}))
    assert first.units == other.units


def test_a_keyword_of_a_plan_that_is_new_is_looked_at() -> None:
    assert set(OTHER) == set(USUAL)
    assert all(OTHER[name] != USUAL[name] for name in USUAL)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"granularity": "element", "round_to": 8}, "round_to: 8 would have no effect"),
        ({"blocks": {"damping": 0.1}}, "blocks.damping: 0.1 would have no effect"),
        ({"blocks": {"reconstruct": {}}}, "blocks.reconstruct: .* would have no effect"),
        ({"criterion": "wanda", "granularity": "element", "scope": "row", "blocks": {"use": True, "targets": "own"}},
         "blocks.targets: own would have no effect"),
    ],
)  # fmt: skip
def test_of_a_recipe_too(recipe: dict[str, object], words: str) -> None:
    data = [torch.randn(4, 8) for _ in range(2)]
    with pytest.raises(RecipeError, match=words):
        sc.prune(Stacks(), data[0], calibration=data, recipe={"target": {"sparsity": 0.5}, **recipe})


def test_a_pruner_refuses_them_as_well() -> None:
    with pytest.raises(RecipeError, match="round_to: 8 would have no effect"):
        Pruner(Stacks(), granularity="element", sparsity=0.5, end=9, round_to=8)


TUNE = {"method": "finetune", "epochs": 1}
WALK = {"method": "gradual", "epochs": 1}
MOVE = {"criterion": "movement", "training": {"method": "movement", "epochs": 1}}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"recover": [{"method": "refit", "what": "bias", "ridge": 0.1}]}, "ridge: 0.1 is read with what: weights"),
        ({"recover": [{"method": "obs_update", "block_size": 8}]}, "block_size: 8 is read with form: block"),
        ({"recover": [{**TUNE, "distil": {"form": "mse", "temperature": 4.0}}]}, "temperature: 4.0 is read with form"),
        ({"recover": [{**TUNE, "distil": {"hidden_weight": 4.0}}]}, "hidden is empty"),
        ({"blocks": {"targets": "own", "shrinkage": 0.5}}, "shrinkage: 0.5 is read with targets: dense"),
        ({"blocks": {"allocation": {"name": "curve", "outliers": 3.0}}}, "outliers: 3.0 is read with name: owl"),
        ({**MOVE, "training": {**MOVE["training"], "threshold": 0.2}}, "threshold: 0.2 is read with form: soft"),  # type: ignore[dict-item]
        ({**MOVE, "training": {**MOVE["training"], "strength": 2.0}}, "strength: 2.0 is read with form: soft"),  # type: ignore[dict-item]
        ({**MOVE, "min_keep": 3}, "reads neither allocation nor min_keep"),
        ({"training": {**WALK, "schedule": "one_shot", "end": 0.5}}, "end is not read with schedule: one_shot"),
        ({"training": {**WALK, "schedule": "one_shot", "initial": 0.1}}, "initial is not read with schedule: one_shot"),
        ({"training": {**WALK, "schedule": {"name": "cycles", "rounds": 3}, "every": 5}}, "every is not read"),
        ({"criterion": "taylor", "training": {"method": "slimming", "epochs": 1,
                                              "penalty": {"name": "gates", "strength": 0.1}}}, "leave criterion out"),
    ],
)  # fmt: skip
def test_keys_of_a_recipe_that_their_neighbours_leave_without_a_meaning(recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({"target": {"sparsity": 0.5}, **recipe})


def test_an_exchange_goes_on_at_every_update_of_one_shot() -> None:
    walk = {**WALK, "schedule": "one_shot", "end": 0.5, "every": 5, "regrow": "set"}
    assert load_recipe({"target": {"sparsity": 0.5}, "training": walk}).training


@pytest.mark.parametrize(
    ("overrides", "decided", "words"),
    [
        (["criterion.reduce=mean"], {"criterion": "taylor"}, "criterion= and overrides='criterion.reduce=mean' both"),
        (["target.macs=0.5"], {"target": {"params": 0.5}}, "target= and overrides='target.macs=0.5' both"),
        (["verify.proof=full"], {"proof": "example"}, "proof= and overrides='verify.proof=full' both"),
        (["verify={proof: full}"], {"proof": "example"}, "proof= and overrides="),
    ],
)
def test_a_keyword_and_an_override(overrides: list[str], decided: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        settings_of(None, overrides, decided, Parts(), recover=None, own=True)


@pytest.mark.parametrize("name", ["2:4", "1:4", "n:m"])
def test_patterns_are_known_by_their_names(name: str) -> None:
    from secateur.planning.unread import refuse_unread

    with pytest.raises(RecipeError, match="min_keep: 3"):
        refuse_unread((Named(name),), {"min_keep": 3})
