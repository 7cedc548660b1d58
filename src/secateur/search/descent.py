"""Greedy descent to a cost: at every step each group alone pays for it once, and the one that is missed least does.

The baseline of a search, and its second way: no sampler, no chance, one evaluation per group and step.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from secateur.errors import RecipeError, TargetError
from secateur.files.seeds import stable_hash
from secateur.objective.evaluate import Objective, with_target
from secateur.planning import Plan
from secateur.recipe import Recipe

STEPS = 6  # on the way to the bound, each of the same ratio
HALVINGS = 5  # of the share of a group that is looked for: to a thirty-second of it
EXACT = ("macs", "params")


@dataclass(frozen=True)
class Bound:
    """Where a descent ends.

    Args:
        what: macs or params, as shares of the model as it came; or latency_ms.
        at_most: the bound.

    Raises:
        RecipeError: another cost, or no number that it can be.
    """

    what: str
    at_most: float

    def __post_init__(self) -> None:
        number = isinstance(self.at_most, (int, float)) and not isinstance(self.at_most, bool)
        if self.what not in (*EXACT, "latency_ms") or not number:
            raise RecipeError(
                f"a descent to {self.what}={self.at_most} is not known", hint="macs=0.5, params or latency_ms"
            )
        if not self.at_most > 0 or (self.what in EXACT and self.at_most >= 1):
            raise RecipeError(f"a descent to {self.what}={self.at_most:g} leads nowhere", hint="for example macs=0.5")


class Descent:
    """Walks down.

    Args:
        objective: evaluates and times.
        base: the recipe whose recovery every proposal gets.
        bound: where it ends.
        quality: recipe -> its quality, turned so that more is better; None where the recipe cannot be. Whatever it
            keeps is what a descent that goes on does not evaluate again.

    Source: after Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications", 2018; here
    every proposal starts from the weights as they came, and costs are counted or measured and not looked up.
    """

    def __init__(
        self, objective: Objective, base: Recipe, bound: Bound, quality: Callable[[Recipe], float | None]
    ) -> None:
        self.objective, self.base, self.bound, self._quality = objective, base, bound, quality
        plan = objective.plan(with_target(base, {"sparsity": 0.0}))
        if not plan.groups:
            raise RecipeError("a descent needs groups that are cut", hint="Use a granularity such as channel.")
        self.groups = list(plan.groups)
        self._costs: dict[str, float] = {}

    def run(self) -> Iterator[Recipe]:
        """The recipe of every step, the last of which meets the bound.

        Raises:
            TargetError: no group can pay any more.
        """
        gone = dict.fromkeys(self.groups, 0.0)
        now = 1.0 if self.bound.what in EXACT else self.objective.dense_ms
        ratio = (self.bound.at_most / now) ** (1 / STEPS)
        while now > self.bound.at_most:
            wanted = max(self.bound.at_most, now * ratio)
            proposals = [found for name in self.groups if (found := self._pay(gone, name, wanted)) is not None]
            judged = [(quality, one) for one in proposals if (quality := self._quality(self.recipe(one))) is not None]
            if not judged:
                raise TargetError(
                    f"The descent ends at {self.bound.what} {now:.4g}, above {self.bound.at_most:g}.",
                    why="no group alone can pay for another step",
                    hint="Ask for less, or lower min_keep_fraction.",
                )
            gone = max(judged, key=lambda pair: pair[0])[1]
            now = self.cost(self.recipe(gone))
            yield self.recipe(gone)

    def recipe(self, gone: Mapping[str, float]) -> Recipe:
        """The base with an amount for every group."""
        return with_target(self.base, {"sparsity": {glob.escape(name): share for name, share in gone.items()}})

    def _pay(self, gone: Mapping[str, float], name: str, wanted: float) -> dict[str, float] | None:
        """The least that this group alone must lose for the cost that is wanted; None where all of it is too little."""
        low, high = gone[name], 1.0
        best = None
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            trial = {**gone, name: round(middle, 4)}
            try:
                enough = self.cost(self.recipe(trial)) <= wanted
            except TargetError:
                high = middle  # more than may go
                continue
            low, high, best = (low, middle, trial) if enough else (middle, high, best)
        return best

    def cost(self, recipe: Recipe) -> float:
        """What a recipe costs, counted from its plan or measured on its model."""
        key = stable_hash(recipe.target.model_dump())
        if key not in self._costs:
            plan = self.objective.plan(recipe)
            self._costs[key] = self._priced(plan)
        return self._costs[key]

    def _priced(self, plan: Plan) -> float:
        if self.bound.what in EXACT:
            before, after = plan.cost[self.bound.what]
            return after / max(before, 1)
        return self.objective.latency_of(plan)
