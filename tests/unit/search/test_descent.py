"""The greedy way down, on groups whose costs and losses are plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from secateur.errors import RecipeError, TargetError
from secateur.recipe import Recipe, load_recipe
from secateur.search.descent import STEPS, Bound, Descent

HURT = {"a": 1.0, "b": 10.0}  # what quality falls by where all of a group goes; either is half of the cost


class Plain:
    """Costs fall as units go; of each group no more than `most` may go."""

    dense_ms = 20.0

    def __init__(self, most: float) -> None:
        self.most = most

    def plan(self, recipe: Recipe) -> SimpleNamespace:
        gone = shares(recipe)
        if max(gone.values()) > self.most:
            raise TargetError("too much")
        left = 1 - sum(gone.values()) / 2
        return SimpleNamespace(groups=dict.fromkeys(HURT), cost={"macs": (1_000_000, round(1_000_000 * left))})

    def latency_of(self, plan: SimpleNamespace) -> float:
        return self.dense_ms * plan.cost["macs"][1] / 1_000_000


def shares(recipe: Recipe) -> dict[str, float]:
    given = recipe.target.given()["sparsity"]
    return {name: float(given[name]) if isinstance(given, Mapping) else float(given) for name in HURT}


def quality(recipe: Recipe) -> float:
    return -sum(HURT[name] * share for name, share in shares(recipe).items())


def descent(bound: Bound, most: float = 1.0) -> Descent:
    base = load_recipe({"target": {"macs": 0.9}})
    return Descent(Plain(most), base, bound, quality)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", [Bound("macs", 0.75), Bound("latency_ms", 15.0)])
def test_the_group_that_is_missed_least_pays_at_every_step(bound: Bound) -> None:
    walk = descent(bound)
    steps = list(walk.run())
    assert all(shares(one)["b"] == 0 for one in steps)
    taken = [shares(one)["a"] for one in steps]
    assert taken == sorted(taken)
    assert len(steps) <= STEPS
    # Half of the group is a quarter of the cost; no share is found closer than to a thirty-second.
    assert 0.5 <= taken[-1] <= 0.5 + 1 / 32
    assert walk.cost(steps[-1]) <= bound.at_most


def test_a_group_that_may_lose_no_more_leaves_the_rest_to_the_others() -> None:
    taken = [shares(one) for one in descent(Bound("macs", 0.75), most=0.3).run()]
    assert 0.2 < taken[-1]["a"] <= 0.3
    assert 0.5 <= taken[-1]["a"] + taken[-1]["b"] <= 0.5 + 1 / 16
    first = next(number for number, one in enumerate(taken) if one["b"] > 0)
    assert first > 0, "the group that is missed less pays first"


def test_where_nobody_can_pay_it_ends_in_words() -> None:
    with pytest.raises(TargetError, match=r"ends at macs 0\.9"):
        list(descent(Bound("macs", 0.75), most=0.1).run())
    with pytest.raises(RecipeError, match="leads nowhere"):
        Bound("macs", 1.0)
