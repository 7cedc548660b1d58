"""What a recipe brings: planned from one removal order, recovered by its steps, read, counted and, if asked, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from secateur.asking import Asked, ByHand, plan_by
from secateur.files.seeds import stable_hash
from secateur.measure import latency, snapshot
from secateur.measure.macs import samples_in
from secateur.measure.paired import Fall
from secateur.objective.gauge import Gauge, GaugeReading, gauge_of
from secateur.objective.selection import Selection, selection_of
from secateur.planning import Plan
from secateur.planning.build import criterion_of, implied_target
from secateur.planning.solved import solver_of
from secateur.recipe import Recipe, load_recipe
from secateur.recipe.overrides import Setting
from secateur.recover.damage import damage_of
from secateur.recover.during import as_asked
from secateur.recover.own import own_training
from secateur.recover.steps import recover as run_step
from secateur.request import Amount
from secateur.types import Snapshot

MOST_ORDERS = 4  # removal orders that are held in memory: scores of single weights are as large as the model
Partial = Callable[[int, float], None]
ROUNDS = 15  # of a latency, in turns with the model as it came


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one recipe brought.

    Args:
        recipe: as it was evaluated.
        plan: its decision.
        figure: the quality on the samples that recipes are chosen by.
        fall: of it, from the model as it came.
        after: the recovered model, counted.
        shares: what is left, as fractions of the model as it came: "params", "macs", "nonzero", "size"; and
            "latency" where it was timed.
        latency_ms: of one forward pass, scaled by the ratio in the same rounds; None where it was not timed.
        seconds: wall time of all of it.
    """

    recipe: Recipe
    plan: Plan
    figure: float
    fall: Fall
    after: Snapshot
    shares: Mapping[str, float]
    latency_ms: float | None
    seconds: float


class Objective:
    """Evaluates recipes for one model on one set of data, all alike.

    A removal order is scored once, whatever the number of amounts that are tried along it: amounts nest, so a plan
    that removes more removes a superset. Every recipe gets its own recovery steps, with the same seed on the same
    batches.

    Args:
        asked: model, data and loop of the run; its recipe is that of no evaluation yet.
        confidence: of each bound of a fall.
        reach: what recipes are chosen by; default: see `selection_of`.
    """

    def __init__(self, asked: Asked, *, confidence: float = 0.95, reach: Selection | None = None) -> None:
        self.selection = selection_of(asked.given) if reach is None else reach
        self.asked = replace(asked, given=self.selection.given)
        self.confidence = confidence
        self.gauge: Gauge = gauge_of(asked.model, self.selection.batches, asked.evaluate, asked.loss)
        self.before: GaugeReading = self.gauge.read(asked.model)
        self._samples = samples_in(asked.model, asked.example)
        self.whole: Snapshot = snapshot(asked.model, asked.example, samples=self._samples)
        self._orders: dict[str, ByHand] = {}
        self._dense_ms: list[float] = []

    @property
    def dense_ms(self) -> float:
        """Milliseconds of one forward pass of the model as it came; measured once."""
        if not self._dense_ms:
            timed = latency({"dense": self.asked.model}, self.asked.example, rounds=2 * ROUNDS)
            self._dense_ms.append(timed["dense"].median)
        return self._dense_ms[0]

    # -- deciding ---------------------------------------------------------------------------------------------

    def plan(self, recipe: Recipe) -> Plan:
        """The plan of a recipe, from the removal order of its criterion.

        Raises:
            TargetError: its target cannot be reached.
            RecipeError, UnsupportedError, InputError: as `secateur.plan`.
        """
        asked = self.asked
        # Refits and scores read the same samples in a trial as in the run that follows it.
        data = asked.given.scoring
        if asked.by_hand:
            return plan_by(asked.model, asked.example, recipe, data, examples=asked.examples, by_hand=asked.by_hand)
        order = self._order(recipe)
        if order is None:
            return plan_by(
                asked.model, asked.example, recipe, data, asked.loss, asked.criterion, asked.examples
            )  # fmt: skip
        plan = plan_by(asked.model, asked.example, recipe, examples=asked.examples, by_hand=order)
        return as_asked(plan, recipe, asked.criterion)

    def _order(self, recipe: Recipe) -> ByHand | None:
        """The scores of a recipe's criterion; None where a solver decides, or a pattern fixes the amount."""
        plain = recipe.model_dump(mode="json", by_alias=True)
        criterion = plain["criterion"] if self.asked.criterion is None else self.asked.criterion
        if solver_of(criterion, plain["blocks"]) is not None or implied_target(plain["granularity"]) is not None:
            return None
        # What decides about scores; amounts, scope and allocation only say what becomes of them.
        kept = ("criterion", "granularity", "protect", "seed", "expressible", "scales")
        key = stable_hash({name: plain[name] for name in kept})
        if key not in self._orders:
            while len(self._orders) >= MOST_ORDERS:
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = {"scores": self._scores(recipe), "comparable": criterion_of(criterion).comparable}
        return self._orders[key]

    def _scores(self, recipe: Recipe) -> Mapping[str, Tensor]:
        asked = self.asked
        # A target that every model meets: whether the recipe's own can be reached is not known yet.
        nothing = with_target(recipe, {"sparsity": 0.0})
        plan = plan_by(
            asked.model, asked.example, nothing, asked.given.scoring, asked.loss, asked.criterion, asked.examples
        )
        assert plan.evidence is not None
        return plan.evidence.scores

    def latency_of(self, plan: Plan) -> float:
        """Milliseconds of one forward pass of the model that a plan leaves, before any recovery."""
        return (
            self.dense_ms if plan.masks else self._slower(plan.apply(self.asked.model, proof="example")) * self.dense_ms
        )

    # -- doing ------------------------------------------------------------------------------------------------

    def evaluate(
        self, recipe: Recipe, *, plan: Plan | None = None, timed: bool = False, partial: Partial | None = None,
        confidence: float | None = None,
    ) -> Evaluation:  # fmt: skip
        """Plan, cut or mask a copy, recover it, and read it.

        Args:
            recipe: what is evaluated.
            plan: of the recipe, where it was made already.
            timed: measure the latency too.
            partial: called as ``partial(step, figure)`` after the cut and after each recovery step but the last; what
                it raises ends the evaluation.
            confidence: of the bound of what is lost; None = that of this object.

        Raises:
            TargetError: the recipe's target cannot be reached.
            NonFiniteError: the recovery diverged, or an output is not finite.
        """
        started = time.perf_counter()
        plan = self.plan(recipe) if plan is None else plan
        # The example alone: the plan that is chosen in the end is proved as the recipe asks.
        model = plan.apply(self.asked.model, proof="example")
        self._recover(model, plan, recipe, partial)
        reading = self.gauge.read(model)
        after = snapshot(model, self.asked.example, samples=self._samples)
        shares, milliseconds = self._shares(after), None
        if timed:
            shares["latency"] = 1.0 if plan.masks else self._slower(model)
            milliseconds = shares["latency"] * self.dense_ms
        fall = self.gauge.fall(self.before, reading, confidence=confidence or self.confidence)
        return Evaluation(
            recipe, plan, reading.figure, fall, after, shares, milliseconds, time.perf_counter() - started
        )

    def _recover(self, model: nn.Module, plan: Plan, recipe: Recipe, partial: Partial | None) -> None:
        asked, given = self.asked, self.asked.given
        damage = damage_of(asked.model, plan, model)
        for number, step in enumerate(recipe.recover):
            if partial is not None:
                partial(number, self.gauge.read(model).figure)
            assert given.train is not None
            assert given.scoring is not None
            run_step(model, step, damage, train=given.train, scoring=given.scoring, loss=asked.loss, seed=recipe.seed)
        if asked.train is not None:
            own_training(model, asked.train, damage.masks, seed=recipe.seed)

    def _shares(self, after: Snapshot) -> dict[str, float]:
        whole = self.whole
        shares = {
            "params": after.params / max(whole.params, 1),
            "nonzero": after.nonzero / max(whole.nonzero, 1),
            "size": after.size_bytes / max(whole.size_bytes, 1),
        }
        return {**shares, "macs": after.macs / whole.macs} if whole.macs and after.macs is not None else shares

    def _slower(self, model: nn.Module) -> float:
        timed = latency({"before": self.asked.model, "after": model}, self.asked.example, rounds=ROUNDS)
        ratio = timed["after"].ratio
        # In the same rounds: what a busy machine does to one of them it does to the other.
        return timed["after"].median / timed["before"].median if ratio is None else ratio[0]


def with_target(recipe: Recipe, target: Mapping[str, Amount]) -> Recipe:
    """The recipe with another target in the place of its own."""
    return load_recipe(recipe, [Setting(("target",), dict(target), "the target that is tried")])
