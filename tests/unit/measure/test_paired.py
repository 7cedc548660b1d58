"""The bounds of a fall are held against simulations, of which the truth is known, and against plain properties."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from secateur.errors import InputError
from secateur.measure.paired import FEWEST, Outcomes, fall_between

SAMPLES, ROUNDS, CONFIDENCE = 300, 600, 0.9


def answers(rng: np.random.Generator, lost: float, won: float, count: int = SAMPLES) -> tuple[Outcomes, Outcomes]:
    """Two models of which the second loses and wins such shares of the samples, and both are right on the rest."""
    drawn = rng.random(count)
    first, second = drawn >= won, drawn < 1 - lost
    return tuple(Outcomes(one.astype(float), np.ones(count), hits=True) for one in (first, second))  # type: ignore[return-value]


@pytest.mark.parametrize(("lost", "won"), [(0.03, 0.01), (0.01, 0.01), (0.10, 0.02), (0.004, 0.0)])
def test_the_bounds_of_hits_hold_as_often_as_they_say(lost: float, won: float) -> None:
    rng = np.random.default_rng(0)
    found = [fall_between(*answers(rng, lost, won), confidence=CONFIDENCE) for _ in range(ROUNDS)]
    truth = 100 * (lost - won)
    # Four standard errors of a share that is counted over so many rounds.
    least = CONFIDENCE - 4 * (CONFIDENCE * (1 - CONFIDENCE) / ROUNDS) ** 0.5
    assert np.mean([one.high >= truth for one in found]) >= least
    assert np.mean([one.low <= truth for one in found]) >= least
    # And they are no wider than they need be: a bound that always holds would say nothing.
    assert np.mean([one.high - one.amount for one in found]) < 4 * 100 * ((lost + won + 1 / SAMPLES) / SAMPLES) ** 0.5


@pytest.mark.parametrize("confidence", [0.9, 0.95, 1 - 0.05 / 6])
@pytest.mark.parametrize("count", [240, 400, 600, 1000, 2000])
def test_a_limit_that_is_broken_is_promised_as_seldom_as_is_said(count: int, confidence: float) -> None:
    # Summed up over all that can be lost, so that promises of one in a hundred are held too: nothing is won, and just
    # as much is lost as is allowed.
    limit, wrong = 0.01, 0.0
    right = Outcomes(np.ones(count), np.ones(count), hits=True)
    for lost in range(int(count * limit) + 1):
        fell = Outcomes(np.arange(count) >= float(lost), np.ones(count), hits=True)
        if fall_between(right, fell, confidence=confidence).high > 100 * limit:
            break
        wrong += comb(count, lost) * limit**lost * (1 - limit) ** (count - lost)
    # Counts are whole, so that no interval meets its share exactly.
    assert wrong <= 1.06 * (1 - confidence)


@pytest.mark.slow
def test_the_bounds_of_losses_hold_as_often_as_they_say() -> None:
    rng, rounds, held = np.random.default_rng(1), 40, 0
    for seed in range(rounds):
        base = rng.gamma(4.0, 0.25, 200)  # mean 1
        worse = base * 1.05 + rng.normal(0, 0.2, 200)
        pair = [Outcomes(values, np.ones(200), hits=False) for values in (base, worse)]
        high = fall_between(*pair, confidence=CONFIDENCE, seed=seed).high
        held += high is not None and high >= 5.0
    assert held / rounds >= CONFIDENCE - 4 * (0.09 / rounds) ** 0.5


def test_who_is_first_turns_the_signs_around() -> None:
    first, second = answers(np.random.default_rng(2), 0.05, 0.02)
    there, back = fall_between(first, second), fall_between(second, first)
    assert there.amount == pytest.approx(-back.amount)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.low < there.amount < there.high
    assert fall_between(first, second, confidence=0.99).high > there.high


def test_models_that_agree_everywhere_are_not_taken_for_equal() -> None:
    same = Outcomes(np.ones(50), np.ones(50), hits=True)
    found = fall_between(same, same)
    assert found.amount == 0
    assert found.high > 1.0, "fifty samples cannot tell a fall of one point"


def test_samples_of_several_targets_are_resampled_whole() -> None:
    rng = np.random.default_rng(3)
    shares, weights = rng.integers(0, 17, 40) / 16, np.full(40, 16.0)
    fell = fall_between(Outcomes(shares, weights, hits=True), Outcomes(shares - 0.25, weights, hits=True))
    # Every sample loses the same: there is nothing that chance could do.
    assert (fell.amount, fell.low, fell.high) == pytest.approx((25, 25, 25))


def test_losses_fall_in_percent_of_the_first_model_in_every_resample() -> None:
    base = np.random.default_rng(4).gamma(4.0, 0.25, 60)
    weights = np.random.default_rng(5).integers(1, 9, 60).astype(float)
    fell = fall_between(Outcomes(base, weights, hits=False), Outcomes(base * 1.25, weights, hits=False))
    # A quarter more on every unit is a quarter more on any choice of them, if both models have the same choice.
    assert (fell.amount, fell.low, fell.high) == pytest.approx((25, 25, 25))


def test_each_bound_of_a_bootstrap_has_the_confidence_that_was_asked_for() -> None:
    ones, noise = np.ones(400), np.random.default_rng(6).normal(0.2, 0.3, 400)
    fell = fall_between(Outcomes(ones, ones, hits=False), Outcomes(ones + noise, ones, hits=False), confidence=0.9)
    reach = 1.2816 * 100 * noise.std() / 20  # nine tenths of a normal distribution lie below so many deviations
    assert fell.high - fell.amount == pytest.approx(reach, rel=0.1)
    assert fell.amount - fell.low == pytest.approx(reach, rel=0.1)


def test_a_few_batches_have_no_bounds() -> None:
    few = Outcomes(np.ones(FEWEST - 1), np.ones(FEWEST - 1), hits=False, what="batches")
    found = fall_between(few, few)
    assert (found.low, found.high) == (None, None)
    assert "too few" in found.method


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (Outcomes(np.ones(9), np.ones(9), hits=False), "same samples"),
        (Outcomes(np.ones(10), np.arange(10.0), hits=False), "same samples"),
    ],
)
def test_other_samples_are_refused(second: Outcomes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        fall_between(Outcomes(np.ones(10), np.ones(10), hits=False), second)


def test_a_loss_that_is_not_positive_has_no_percent() -> None:
    below = Outcomes(-np.ones(10), np.ones(10), hits=False)
    with pytest.raises(InputError, match="no percent"):
        fall_between(below, below)
