"""How far one model falls behind another on the same samples, and how sure that is.

Both models answer the same questions, so most of what chance does to one of them it does to the other: an interval of
the difference is far narrower than two intervals of the figures would let one think.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from secateur.errors import InputError

RESAMPLES = 2000
MOST_NUMBERS = 1_000_000  # that are drawn at a time: a test part may be large
HALVINGS = 40  # of the interval in which a bound lies: to the last digit of a percentage and beyond
FEWEST = 8  # units that a bootstrap needs: of fewer the resamples are too much alike to say anything


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What a model did on every unit of some data.

    Args:
        values: one per unit: the share of its targets that were hit, or its loss.
        weights: targets or samples of the unit.
        hits: whether values are shares of hits, of which more is better; else losses.
        what: what a unit is, in the plural.
    """

    values: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    hits: bool
    what: str = "samples"

    @property
    def figure(self) -> float:
        """The mean over all of them."""
        return float((self.values * self.weights).sum() / self.weights.sum())


@dataclass(frozen=True)
class Fall:
    """How much worse the second of two models is.

    Args:
        amount: points (hundredths) of a share, or percent of the first model's figure; negative = it is better.
        low: it is at least so much with the confidence that was asked for; None where nothing is known of chance.
        high: it is at most so much, with the same confidence each.
        method: where the bounds come from, in words.
    """

    amount: float
    low: float | None = None
    high: float | None = None
    method: str = "one figure, of which nothing is known but its value"

    def words(self, unit: str, confidence: float) -> str:
        """The fall and its upper bound, as a loss or a gain.

        Args:
            unit: "points" or "percent".
            confidence: of the bound.

        Example:
            >>> Fall(0.2, -0.3, 0.7).words("points", 0.95)
            'lost 0.20 points, 0.70 lost at most with 95% confidence'
            >>> Fall(-3.0, -4.0, -2.0).words("points", 0.95)
            'gained 3.00 points, 2.00 gained at least with 95% confidence'
        """
        moved = f"lost {self.amount:.2f} {unit}" if self.amount >= 0 else f"gained {-self.amount:.2f} {unit}"
        if self.high is None:
            return moved
        bound = f"{self.high:.2f} lost at most" if self.high >= 0 else f"{-self.high:.2f} gained at least"
        return f"{moved}, {bound} with {confidence:.0%} confidence"


def fall_between(before: Outcomes, after: Outcomes, *, confidence: float = 0.95, seed: int = 0) -> Fall:
    """The fall of the quality from one model to another on the same units, with one-sided bounds.

    Single targets that are hit or missed are paired counts: only the samples on which the models disagree count, and
    the bounds are right down to none of these (score intervals). All else is resampled, both models on the same units.

    Args:
        before: of the first model.
        after: of the second, on the same units in the same order.
        confidence: of each bound.
        seed: of the resampling.

    Raises:
        InputError: not the same units, or losses that are not above 0, of which there are no percent.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", 1998 (score interval); Efron, "Bootstrap methods: another look at the jackknife", 1979 (percentiles).

    Example:
        >>> right = Outcomes(np.ones(400), np.ones(400), hits=True)
        >>> fell = Outcomes(np.arange(400) >= 4.0, np.ones(400), hits=True)
        >>> found = fall_between(right, fell)
        >>> round(found.amount, 2), round(found.high, 2)
        (1.0, 2.21)
    """
    if len(before.values) != len(after.values) or not np.array_equal(before.weights, after.weights):
        raise InputError(
            "the two models were not measured on the same samples",
            why=f"{len(before.values)} against {len(after.values)} {before.what}",
            hint="give data that hand out the same batches at every reading",
        )
    if before.hits and bool((before.weights == 1).all()):
        return _paired_counts(before.values, after.values, confidence)
    base = before.figure
    if not before.hits and base <= 0:
        raise InputError(
            f"the loss of the model as it came is {base:g}, of which there are no percent",
            hint="give evaluate=, or a loss that is above 0",
        )
    worse = before.figure - after.figure if before.hits else (after.figure - base) / base
    amount = 100 * worse
    if len(before.values) < FEWEST:
        return Fall(amount, method=f"{len(before.values)} {before.what}, too few for bounds")
    return Fall(
        amount, *_resampled(before, after, confidence, seed), f"bootstrap of {len(before.values)} {before.what}"
    )


def _paired_counts(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], confidence: float) -> Fall:
    first, second, count = before > 0.5, after > 0.5, len(before)
    lost, won = int((first & ~second).sum()), int((~first & second).sum())
    said = f"{lost} samples lost and {won} won of {count}, paired counts"
    reach = NormalDist().inv_cdf(confidence)
    low, high = -_most(won, lost, count, reach), _most(lost, won, count, reach)
    return Fall(100 * (lost - won) / count, 100 * low, 100 * high, said)


def _most(lost: int, won: int, count: int, reach: float) -> float:
    """The largest fall that the counts do not speak against, by bisection."""
    low, high = (lost - won) / count, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _distance(lost, won, count, middle) < reach else (low, middle)
    return low


def _distance(lost: int, won: int, count: int, fall: float) -> float:
    """How many standard errors the counts lie below a fall, with the error that there is if this fall is the truth."""
    # The likeliest share of samples that are won, given the fall: the error of the counts themselves would be far too
    # small where few of them are lost, as none at all would then pass for certainty.
    half = (2 * count - lost + won) * fall - lost - won
    share = (math.sqrt(max(half**2 + 8 * count * won * fall * (1 - fall), 0.0)) - half) / (4 * count)
    error = math.sqrt(max(count * (2 * share + fall * (1 - fall)), 0.0))
    return (count * fall - lost + won) / error if error else 0.0


def _resampled(before: Outcomes, after: Outcomes, confidence: float, seed: int) -> tuple[float, float]:
    rng, count = np.random.default_rng(seed), len(before.values)
    weights = before.weights
    first, second = before.values * weights, after.values * weights
    found = np.empty(RESAMPLES)
    many = max(1, MOST_NUMBERS // count)
    for start in range(0, RESAMPLES, many):
        # One choice for both models: that is what makes it a paired comparison.
        chosen = rng.integers(0, count, (min(many, RESAMPLES - start), count))
        whole, drawn = weights[chosen].sum(1), slice(start, start + many)
        means = first[chosen].sum(1) / whole, second[chosen].sum(1) / whole
        found[drawn] = 100 * (means[0] - means[1] if before.hits else (means[1] - means[0]) / means[0])
    low, high = np.quantile(found, [1 - confidence, confidence])
    return float(low), float(high)
