"""Two models against each other, by a protocol that also says when nothing can be said.

Both run in every round, in random order, and the first runs twice: the ratio of its own two times is the null, what the
machine makes of no difference at all. Medians of ratios within a round, with intervals from resampled rounds.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from secateur.errors import RecipeError
from secateur.measure.latency import FEWEST_ROUNDS, Timer, timed
from secateur.measure.machine import Surroundings, machine, ticks
from secateur.types import Example

Verdict = Literal["faster", "slower", "no difference", "cannot be told"]
RESAMPLED = 2000  # draws of rounds; the ends of an interval of 95 % rest on fifty of them each
WIDEST = 0.03  # a null interval that reaches further from 1 says that the machine is too busy for any claim


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios within rounds, and the interval that holds it in 95 % of resampled sets of rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f}x (95 %: {self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True)
class Versus:
    """How the second of two models compares with the first.

    Args:
        first_ms: median of the first model's times.
        second_ms: median of the second's.
        ratio: second over first; below 1 the second is faster.
        null: the first over itself.
        verdict: of the second: "faster" or "slower" where its whole interval lies beyond both the null's and 1, "no
            difference" where not, and "cannot be told" where the null reaches further than 3 % from 1.
        rounds: how many there were.
        batch_size: samples in the input.
        stolen: share of the processors' time that other virtual machines took meanwhile.
        machine: where.
    """

    first_ms: float
    second_ms: float
    ratio: Ratio
    null: Ratio
    verdict: Verdict
    rounds: int
    batch_size: int
    stolen: float
    machine: Surroundings


def versus(
    first: nn.Module,
    second: nn.Module,
    example: Example,
    *,
    rounds: int = 30,
    seconds: float | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    timer: Timer = time.perf_counter,
) -> Versus:
    """Compare the forward passes of two models.

    Args:
        first: what is compared with.
        second: what is compared; may be the first.
        example: what both take.
        rounds: at most; not below six, which cannot tell a difference from chance.
        seconds: time budget for all rounds, or None.
        threads: CPU threads, put back afterwards; None leaves the setting alone.
        batch_size: repeat or trim the example to this size.
        seed: of the order in the rounds and of the resampling.
        timer: a clock in seconds; `time.process_time` with one thread counts the processor's time, for machines that
            others use.

    Raises:
        RecipeError: an option out of range.
        ForwardError: a forward fails.

    Cost: three forward passes a round.
    """
    if rounds < FEWEST_ROUNDS:
        raise RecipeError(
            f"rounds={rounds} is too few to compare two models.",
            why=f"below {FEWEST_ROUNDS} rounds a difference cannot be told from chance",
            hint=f"{FEWEST_ROUNDS} or more; one model alone may be timed in a single round",
        )
    names = ("first", "again", "second")
    before, chance = ticks(), random.Random(seed)  # noqa: S311
    taken, used, size, _ = timed(
        dict(zip(names, (first, first, second), strict=True)), example, rounds=rounds,
        seconds=seconds, threads=threads, batch_size=batch_size, timer=timer, chance=chance,
    )  # fmt: skip
    after = ticks()
    mine, again, other = (np.array(taken[name]) for name in names)
    # The mean of both runs of the first is the steadier one to be compared with.
    null, ratio = _ratio(again / mine, seed), _ratio(other / ((mine + again) / 2), seed)
    stolen = (after[1] - before[1]) / max(1, after[0] - before[0])
    where = machine()
    where["threads"] = used
    first_ms, second_ms = (float(np.median(each)) * 1e3 for each in (np.concatenate([mine, again]), other))
    return Versus(first_ms, second_ms, ratio, null, judge(ratio, null), len(other), size, stolen, where)


def judge(ratio: Ratio, null: Ratio) -> Verdict:
    """What may be said of a ratio, given the ratio of a model to itself.

    Example:
        >>> judge(Ratio(0.5, 0.48, 0.52), Ratio(1.0, 0.99, 1.01))
        'faster'
    """
    # An interval of 95 % leaves 1 out once in twenty where all is well, so that alone spoils nothing: whatever the null
    # shows counts as no difference.
    low, high = min(1.0, null.low), max(1.0, null.high)
    if high > 1 + WIDEST or low < 1 - WIDEST:
        return "cannot be told"
    if ratio.high < low:
        return "faster"
    return "slower" if ratio.low > high else "no difference"


def _ratio(values: np.ndarray[tuple[int], np.dtype[np.float64]], seed: int) -> Ratio:
    drawn = np.random.default_rng(seed).choice(values, (RESAMPLED, len(values)))
    low, high = np.percentile(np.median(drawn, 1), [2.5, 97.5])
    return Ratio(float(np.median(values)), float(low), float(high))
