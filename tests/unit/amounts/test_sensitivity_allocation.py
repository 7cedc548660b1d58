"""Amounts by curves: the choice is the cheapest there is, found by trying all of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.amounts.allocate.sensitivity import Curves, LossCurve, spread_of
from secateur.errors import RecipeError


def allocation(**curves: tuple[list[float], list[float]]) -> dict[str, object]:
    listed = [{"group": name, "ratios": x, "falls": y} for name, (x, y) in curves.items()]
    return {"name": "sensitivity", "curves": listed}


@pytest.mark.parametrize("seed", range(6))
def test_no_other_amounts_cost_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {"a": 6, "b": 4, "c": 5}
    # Convex curves: those are what an exchange between two groups cannot improve.
    falls = {name: np.cumsum(np.sort(rng.gamma(1.0, 1.0, size))) for name, size in sizes.items()}
    curves = Curves(
        {
            name: LossCurve(tuple((np.arange(size) + 1) / size), tuple(falls[name].tolist()))
            for name, size in sizes.items()
        }
    )
    worth = curves.worth({name: torch.from_numpy(rng.random(size)) for name, size in sizes.items()})
    for count in range(1, sum(sizes.values())):
        ranked = sorted((float(v), name) for name, values in worth.items() for v in values)[:count]
        gone = {name: sum(one == name for _, one in ranked) for name in sizes}
        cost = sum(falls[name][n - 1] for name, n in gone.items() if n)
        best = min(
            sum(falls[name][n - 1] for name, n in zip(sizes, taken, strict=True) if n)
            for taken in product(*(range(size + 1) for size in sizes.values()))
            if sum(taken) == count
        )
        # Slopes rise evenly between the middles of pieces, so that near ties may be settled the other way.
        assert cost <= best * 1.15 + 1e-9


def test_scores_order_the_units_and_curves_the_groups() -> None:
    curves = Curves({"a": LossCurve((0.5, 1.0), (1.0, 4.0)), "b": LossCurve((0.5, 1.0), (0.0, 0.1))})
    scores = {"a": torch.tensor([3.0, 1.0, 2.0, 4.0]), "b": torch.tensor([9.0, 8.0]), "c": torch.ones(2)}
    worth = curves.worth(scores)
    assert worth["a"].argsort().tolist() == scores["a"].argsort().tolist()
    assert float(worth["b"].max()) < float(worth["a"].min())
    assert bool(worth["c"].isinf().all()), "nothing is known of this group, so it stays whole"


def test_a_curve_that_falls_or_bends_downwards_is_made_to_rise() -> None:
    places, slopes = LossCurve((0.25, 0.5, 1.0), (2.0, 1.0, 3.0)).slopes()
    assert list(slopes) == sorted(slopes)
    assert slopes[0] >= 0
    assert len(places) == len(slopes)


def test_what_makes_a_model_better_costs_nothing_and_is_no_reason_to_lose_more() -> None:
    places, slopes = LossCurve((0.25, 0.5, 1.0), (-1.0, 2.0, 4.0)).slopes()
    # Nothing up to a quarter, and from there to the end by the straight way: 4 over 0.75.
    assert places.tolist() == pytest.approx([0.125, 0.625])
    assert slopes.tolist() == pytest.approx([0.0, 4 / 0.75])


def test_groups_whose_curves_are_flat_lose_alike() -> None:
    flat = LossCurve((1.0,), (0.0,))
    worth = Curves({"a": flat, "b": flat, "c": LossCurve((1.0,), (1.0,))}).worth(
        {name: torch.rand(10) for name in "abc"}
    )
    ranked = sorted((float(value), name) for name in "abc" for value in worth[name])
    for count in range(2, 20, 2):
        assert [sum(name == group for _, name in ranked[:count]) for group in "ab"] == [count // 2] * 2


@pytest.mark.parametrize("granularity", ["channel", "element", "vector"])
def test_a_plan_takes_them_and_meets_its_target(granularity: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    names = ("0", "2") if granularity == "channel" else ("0.weight", "2.weight", "4.weight")
    curves = {"name": "sensitivity", "curves": [
        {"group": name, "ratios": [0.5, 1.0], "falls": [5.0, 50.0] if place == 0 else [0.1, 1.0]}
        for place, name in enumerate(names)]}  # fmt: skip
    plan = sc.plan(net, torch.zeros(1, 1, 6, 6), target={"sparsity": 0.4}, granularity=granularity, allocation=curves)
    whole = sc.plan(net, torch.zeros(1, 1, 6, 6), target={"sparsity": 0.4}, granularity=granularity)
    assert plan.units["removed"] == whole.units["removed"]
    assert plan.request.allocation == "sensitivity"
    keep = plan.evidence.keep
    assert float(keep[names[0]].float().mean()) > float(keep[names[1]].float().mean())
    assert sc.plan(net, torch.zeros(1, 1, 6, 6), target={"sparsity": 0.2}, granularity=granularity, allocation=curves)
    recipe = sc.load_recipe({"target": {"sparsity": 0.4}, "granularity": granularity, "allocation": curves})
    same = sc.prune(net, torch.zeros(1, 1, 6, 6), recipe=recipe, overrides=["measure.latency=false"]).plan
    assert all(torch.equal(same.evidence.keep[name], mask) for name, mask in keep.items())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sensitivity", "needs the curves"),
        ({"name": "sensitivity"}, "needs the curves"),
        ({"name": "sensitivity", "curves": [3]}, "is no curve"),
        (allocation(a=([0.5, 0.2], [1, 2])), "ratios rise"),
        (allocation(a=([0.5], [1, 2])), "2 falls"),
        (allocation(a=([0.5, 1.5], [1, 2])), "ratios rise"),
        (allocation(a=([0.5], [float("nan")])), "is no curve"),
        ({"curves": []}, "is no choice"),
    ],
)
def test_what_is_no_curve_is_refused(given: object, words: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(RecipeError, match=words):
        sc.plan(net, torch.zeros(1, 4), target={"sparsity": 0.5}, allocation=given)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"scope": "local"}, "ranks all units together"),
        ({"granularity": "2:4", "target": None}, "2:4 leaves nothing else to choose"),
    ],
)
def test_a_share_of_its_own_per_group_contradicts_curves(more: dict[str, object], words: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    given = {"target": {"sparsity": 0.5}, "allocation": allocation(**{"0": ([0.5], [1.0])}), **more}
    with pytest.raises(RecipeError, match=words):
        sc.plan(net, torch.zeros(1, 4), **given)


def test_a_training_that_prunes_refuses_them() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    curves = allocation(**{"0.weight": ([0.5], [1.0])})
    with pytest.raises(RecipeError, match="training that prunes"):
        sc.Pruner(net, sparsity=0.5, end=10, optimizer=optimizer, granularity="element", allocation=curves)


def test_names_alone_have_no_curves() -> None:
    assert spread_of("erk") == ("erk", None)
    assert spread_of({"name": "lamp"}) == ("lamp", None)
