"""The arithmetic of a fair comparison: paired differences, intervals, corrected tests, rank agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby, pairwise
from statistics import correlation
from typing import Any

from secateur.errors import UnsupportedError


@dataclass(frozen=True)
class Paired:
    """A paired comparison of one method with the reference.

    Args:
        pairs: seeds that both have.
        mean: mean difference, method minus reference.
        sd: standard deviation of the differences (n - 1), or None with one pair.
        half: half-width of the confidence interval of the mean, or None where there is no test.
        p: two-sided p of Student's t test against 0; None where there is no test.
    """

    pairs: int
    mean: float
    sd: float | None = None
    half: float | None = None
    p: float | None = None


def require_scipy() -> Any:
    """``scipy.special`` (``scipy.stats`` takes seconds to import), or an error that names the extra.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    try:
        return import_module("scipy.special")
    except ImportError as error:
        raise UnsupportedError(
            "comparing over several seeds needs scipy, for Student's t", hint="pip install 'secateur[search]'"
        ) from error


def paired(method: Mapping[int, float], reference: Mapping[int, float], *, confidence: float = 0.95) -> Paired:
    """Compare a method with the reference on the seeds that both have.

    Differences that are all equal have no spread to test against, so they get an interval of width zero and no p:
    with a coarse metric and three seeds that happens by chance, and is no proof.

    Args:
        method: seed -> quality.
        reference: seed -> quality on the same base model, samples and batches.
        confidence: of the interval.

    Returns:
        The comparison.

    Source: Student's paired t test; half-width t(n-1) * sd / sqrt(n).

    Example:
        >>> found = paired({0: 0.9, 1: 0.8, 2: 0.85}, {0: 0.8, 1: 0.75, 2: 0.7})
        >>> found.pairs, round(found.mean, 3), round(found.half / found.sd, 2)
        (3, 0.1, 2.48)
    """
    shared = sorted(set(method) & set(reference))
    differences = [method[seed] - reference[seed] for seed in shared]
    count = len(differences)
    if not count:
        return Paired(0, math.nan)
    mean = math.fsum(differences) / count
    if count == 1:
        return Paired(1, mean)
    sd = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1))
    # Rounding leaves some 1e-17 between differences that are equal on paper.
    if sd <= 1e-12 * max(1.0, *(abs(d) for d in differences)):
        return Paired(count, mean, 0.0, 0.0)
    special, error = require_scipy(), sd / math.sqrt(count)
    half = float(special.stdtrit(count - 1, 0.5 + confidence / 2)) * error
    return Paired(count, mean, sd, half, 2 * float(special.stdtr(count - 1, -abs(mean) / error)))


def holm(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Correct p values of one family by Holm's step-down method; None (no test) stays out of the family.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': None, 'd': 0.06}
    """
    known = sorted(((p, name) for name, p in values.items() if p is not None), key=lambda item: item)
    corrected: dict[str, float | None] = dict.fromkeys(values)
    highest = 0.0
    for place, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * p))
        corrected[name] = highest
    return corrected


def kendall(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Kendall's tau-b of two lists of scores of the same things; None where one of them is all ties.

    Cost: every pair, so for lists of methods and not for lists of weights.

    Source: Kendall, "The Treatment of Ties in Ranking Problems", 1945.

    Example:
        >>> kendall([1, 2, 3], [1, 2, 3]), kendall([1, 2, 3], [3, 2, 1]), kendall([1, 1], [1, 2])
        (1.0, -1.0, None)
    """
    both = left_only = right_only = 0
    for i in range(len(left)):
        for j in range(i):
            a, b = _sign(left[i] - left[j]), _sign(right[i] - right[j])
            both += a * b
            left_only += a != 0
            right_only += b != 0
    if not left_only or not right_only:
        return None
    return both / math.sqrt(left_only * right_only)


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where one of the lists is all ties.

    Source: Spearman, "The Proof and Measurement of Association between Two Things", 1904.

    Example:
        >>> spearman([1, 2, 3], [10, 20, 30]), spearman([1, 1], [1, 2])
        (1.0, None)
    """
    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return min(1.0, max(-1.0, correlation(_ranks(left), _ranks(right))))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    for _, tied in groupby(enumerate(order), key=lambda item: values[item[1]]):
        places = list(tied)
        middle = (places[0][0] + places[-1][0]) / 2
        for _, index in places:
            ranks[index] = middle
    return ranks


def curve_mean(curve: Mapping[float, float]) -> float | None:
    """Mean quality over a curve with the logarithm of the density as the axis (trapezoids).

    Every halving of what is left counts alike; None with fewer than two levels.

    Args:
        curve: level (fraction removed, in [0, 1)) -> quality.

    Example:
        >>> curve_mean({0.5: 1.0, 0.75: 0.0})
        0.5
    """
    points = sorted((math.log(1 - level), value) for level, value in curve.items())
    if len(points) < 2:
        return None
    pairs = pairwise(points)
    area = math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairs)
    return area / (points[-1][0] - points[0][0])


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
