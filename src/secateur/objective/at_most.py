"""The smallest model that loses at most so much: bisection along one removal order, chosen by bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil
from statistics import NormalDist
from typing import TypedDict

from torch import nn

from secateur.asking import Asked
from secateur.errors import NonFiniteError, RecipeError, TargetError
from secateur.objective.evaluate import Objective, with_target
from secateur.objective.gauge import gauge_of
from secateur.objective.limits import AtMost, Smallest
from secateur.planning.build import implied_target, is_structured, what_it_saves
from secateur.recipe import Recipe
from secateur.report.bound import Attempt, Limit, Measured
from secateur.stages import RunStages
from secateur.types import Advance

STEPS = 64  # from the whole model downwards; the smallest step and six amounts beyond it are tried
LOOKS = 6  # beyond the smallest step: STEPS halved until one is left
HALVING, HALVING_OF_MASKS = 16, 8  # steps that halve what is left: 4.2 % less at each, of masks 8.3 %


class AttemptData(TypedDict):
    """An attempt as plain data, which a run that goes on finds again."""

    amount: float
    removed: float
    params: float | None
    macs: float | None
    nonzero: float | None
    drop: float | None
    low: float | None
    high: float | None
    method: str
    kept: bool
    why: str
    seconds: float


Once = Callable[[str, Callable[[], AttemptData]], AttemptData]


class Bisection:
    """Finds the amount.

    Args:
        wanted: the limit.
        asked: the run, with the recipe whose target is found.
        objective: evaluates amounts; made here by default.
    """

    def __init__(self, wanted: AtMost, asked: Asked, objective: Objective | None = None) -> None:
        self.wanted, self.recipe = wanted, asked.settings
        self.word = wanted.smallest or usual_word(self.recipe)
        check(wanted, asked, self.word)
        self.objective = Objective(asked) if objective is None else objective
        self._known: dict[int, AttemptData] = {}

    def at(self, step: int) -> Recipe:
        """The recipe with the amount of a step."""
        return with_target(self.recipe, {self.word: self.amount(step)})

    def amount(self, step: int) -> float:
        """The number of the target at a step."""
        masks = not is_structured(self.recipe.model_dump(by_alias=True)["granularity"])
        left: float = 0.5 ** (step / (HALVING_OF_MASKS if masks else HALVING))
        if self.word == "latency_ms":
            return round(left * self.objective.dense_ms, 4)
        return round(1 - left if self.word == "sparsity" else left, 4)

    def find(self, once: Once, progress: Advance | None = None) -> tuple[Recipe, Limit]:
        """The recipe with the amount that was found, and what was tried on the way.

        The smallest step comes first, with all of the confidence, and without it nothing is promised. Is it one that
        loses too much, no other promise can be wrong unless this one was; is it not, only the looks after it can be
        wrong, which share the confidence out among them. So in both cases it holds.

        What is lost is taken to grow with what goes. A recovery makes it waver, so that of two close amounts the
        larger may seem to lose less: then one of them is found that keeps the limit, and not surely the last one.

        Args:
            once: ``once(name, work)`` does the work, or gives what an earlier process found.
            progress: called as ``progress(done, total)`` with attempts.

        Raises:
            TargetError: no amount is sure to keep the limit; says how far it is from one.
        """
        tried = list[AttemptData]()

        def keeps(step: int, confidence: float) -> bool:
            if progress is not None:
                progress(len(tried), 1 + LOOKS)
            tried.append(once(f"attempt {step}", partial(self._attempt, step, confidence)))
            return tried[-1]["kept"]

        if not keeps(1, self.wanted.confidence):
            raise self._none(tried)
        low, high = 1, STEPS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if keeps(middle, self.wanted.each(LOOKS)) else (low, middle)
        best = next(one for one in tried if one["amount"] == self.amount(low))
        return self.at(low), self._limit(tried, best)

    def _attempt(self, step: int, confidence: float) -> AttemptData:
        amount = self.amount(step)
        empty: AttemptData = {
            "amount": amount, "removed": 0.0, "params": None, "macs": None, "nonzero": None, "drop": None, "low": None,
            "high": None, "method": "", "kept": False, "why": "", "seconds": 0.0,
        }  # fmt: skip
        try:
            plan = self.objective.plan(self.at(step))
            removed = plan.units["removed"]
            # Along one order equal counts are equal plans: layers and heads have far fewer amounts than steps.
            if removed in self._known:
                return {**self._known[removed], "amount": amount, "seconds": 0.0}
            found = self.objective.evaluate(self.at(step), plan=plan, confidence=confidence)
        except (TargetError, NonFiniteError) as error:
            return {**empty, "why": error.what}
        fall, shares = found.fall, found.shares
        bound = fall.amount if fall.high is None else fall.high
        self._known[removed] = {
            "amount": amount, "removed": plan.units["sparsity"], "params": shares["params"],
            "macs": shares.get("macs"), "nonzero": shares["nonzero"], "drop": fall.amount, "low": fall.low,
            "high": fall.high, "method": fall.method, "kept": bound <= self.wanted.max_drop, "why": "",
            "seconds": round(found.seconds, 3),
        }  # fmt: skip
        return self._known[removed]

    def _limit(self, tried: list[AttemptData], best: AttemptData) -> Limit:
        objective = self.objective
        assert best["drop"] is not None
        return Limit(
            max_drop=float(self.wanted.max_drop),
            unit=objective.gauge.unit(objective.before),
            figure=objective.gauge.name,
            smallest=self.word,
            confidence=self.wanted.confidence,
            amount=best["amount"],
            chosen_by=objective.selection.on,
            chosen=Measured(drop=best["drop"], low=best["low"], high=best["high"], method=best["method"]),
            attempts=tuple(Attempt(**one) for one in tried),
        )

    def _none(self, tried: list[AttemptData]) -> TargetError:
        unit, limit = self.objective.gauge.unit(self.objective.before), self.wanted.max_drop
        least = tried[-1]
        what = f"No {self.word} is sure to lose at most {limit:g} {unit} of {self.objective.gauge.name}."
        if least["drop"] is None:
            return TargetError(what, why=f"the smallest step, {self.word} {least['amount']:g}: {least['why']}")
        bound = (
            ""
            if least["high"] is None
            else f", {least['high']:.2f} at most with {self.wanted.confidence:.0%} confidence"
        )
        why = f"the smallest step, {self.word} {least['amount']:g}, lost {least['drop']:.2f}{bound}: {least['method']}"
        outcomes = self.objective.before.outcomes
        few = outcomes is not None and outcomes.hits and len(outcomes.values) < self._fewest()
        hint = (
            f"Of {len(outcomes.values)} samples none is enough: give {self._fewest()} or more to choose by."
            if few and outcomes is not None
            else "Allow more, give more data to choose by or a longer recovery, or lower confidence."
        )
        return TargetError(what, why=why, hint=hint)

    def _fewest(self) -> int:
        """Samples of which the limit can be known at all: if all answers agree, the bound is z² / (samples + z²)."""
        limit = self.wanted.max_drop / 100
        return ceil(NormalDist().inv_cdf(self.wanted.confidence) ** 2 * (1 - limit) / limit)


def usual_word(recipe: Recipe) -> Smallest:
    """The target whose amount is found where none is named."""
    return what_it_saves(recipe.model_dump(by_alias=True)["granularity"]) or "sparsity"


def check(wanted: AtMost, asked: Asked, word: str) -> None:
    """Refuse what decides about amounts as well, before anything long starts.

    Raises:
        RecipeError: the recipe or the caller fixes the amount.
    """
    plain = asked.settings.model_dump(by_alias=True)
    if implied_target(plain["granularity"]) is not None:
        raise RecipeError(
            f"max_drop={wanted.max_drop:g}: {plain['granularity']} fixes how much goes.",
            hint="Leave max_drop out, or choose another granularity.",
        )
    if asked.settings.training is not None:
        raise RecipeError(
            f"max_drop={wanted.max_drop:g}: training: {asked.settings.training.method} walks to an amount of its own.",
            hint="Use a recipe that prunes in one step.",
        )
    exact = [name for name in ("keep", "remove", "masks") if name in asked.by_hand]
    if exact:
        raise RecipeError(f"{exact[0]}= says exactly what goes.", hint="Leave out max_drop.")
    if word != "sparsity" and not is_structured(plain["granularity"]):
        raise RecipeError(
            f"smallest={word!r}: masks leave {word} as it is.", hint="Use sparsity, or a granularity that is cut."
        )


def confirmed(limit: Limit, asked: Asked, model: nn.Module) -> Limit:
    """The limit with what the finished model loses on the test part, which nothing was chosen by.

    Args:
        limit: what was found.
        asked: the run.
        model: as it goes.
    """
    if asked.given.test is None:
        return limit.model_copy(update={"verdict": "unconfirmed"})
    gauge = gauge_of(asked.model, asked.given.test, asked.evaluate, asked.loss)
    fall = gauge.fall(gauge.read(asked.model), gauge.read(model), confidence=limit.confidence)
    held = fall.amount <= limit.max_drop
    sure = held and fall.high is not None and fall.high <= limit.max_drop
    test = Measured(drop=fall.amount, low=fall.low, high=fall.high, method=fall.method)
    return limit.model_copy(update={"test": test, "verdict": "sure" if sure else "held" if held else "missed"})


def found_at_most(asked: Asked, wanted: AtMost, kept: RunStages, progress: Advance | None) -> tuple[Asked, Limit]:
    """The run with the amount that keeps the limit; attempts that an earlier process made are not made again."""
    search = Bisection(wanted, asked)
    recipe, limit = search.find(kept.once, progress)
    # The scores of the attempts serve the plan, so that what was tried is what is done.
    return replace(asked, settings=recipe, planned=lambda: search.objective.plan(recipe)), limit
