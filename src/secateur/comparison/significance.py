"""The arithmetic of a fair comparison: paired differences, intervals, corrected tests, rank agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import correlation, fmean, stdev
from types import ModuleType

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


def require_scipy() -> ModuleType:
    """``scipy.stats``, or an error that names the extra.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    # Not at the top of the file: it takes a second, and only comparisons need it.
    try:
        return import_module("scipy.stats")
    except ImportError as error:
        raise UnsupportedError(
            "a comparison needs scipy, for Student's t and rank agreement", hint="pip install 'secateur[search]'"
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
    if not differences:
        return Paired(0, math.nan)
    if len(differences) == 1:
        return Paired(1, differences[0])
    mean, sd = fmean(differences), stdev(differences)
    # Rounding leaves some 1e-17 between differences that are equal on paper.
    if sd <= 1e-12 * max(1.0, *(abs(difference) for difference in differences)):
        return Paired(len(differences), mean, 0.0, 0.0)
    stats = require_scipy()
    test = stats.ttest_1samp(differences, 0.0)
    half = float(stats.t.ppf(0.5 + confidence / 2, test.df)) * float(stats.sem(differences))
    return Paired(len(differences), mean, sd, half, float(test.pvalue))


def holm(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Correct p values of one family by Holm's step-down method; None (no test) stays out of the family.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': None, 'd': 0.06}
    """
    # scipy corrects for false discoveries (Benjamini-Hochberg), which promises less; it has no Holm.
    known = sorted(((p, name) for name, p in values.items() if p is not None), key=lambda item: item)
    corrected: dict[str, float | None] = dict.fromkeys(values)
    highest = 0.0
    for place, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * p))
        corrected[name] = highest
    return corrected


def kendall(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Kendall's tau-b of two lists of scores of the same things; None where one of them is all ties.

    Source: Kendall, "The Treatment of Ties in Ranking Problems", 1945; `scipy.stats.kendalltau`.

    Example:
        >>> kendall([1, 2, 3], [1, 2, 3]), kendall([1, 2, 3], [3, 2, 1]), kendall([1, 1], [1, 2])
        (1.0, -1.0, None)
    """
    if _all_tied(left) or _all_tied(right):
        return None
    return float(require_scipy().kendalltau(left, right).statistic)


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where one of the lists is all ties.

    Source: Spearman, "The Proof and Measurement of Association between Two Things", 1904.

    Example:
        >>> spearman([1, 2, 3], [10, 20, 30]), spearman([1, 1], [1, 2])
        (1.0, None)
    """
    if _all_tied(left) or _all_tied(right):
        return None
    rank = require_scipy().rankdata
    # spearmanr takes this correlation in floating point and gives 0.9999999999999999 for equal orders; the one of the
    # standard library is exact before its last rounding.
    return min(1.0, max(-1.0, correlation(rank(left).tolist(), rank(right).tolist())))


def _all_tied(values: Sequence[float]) -> bool:
    """No order to agree with; scipy gives NaN there, and warns."""
    return len(set(values)) < 2


def curve_mean(curve: Mapping[float, float]) -> float | None:
    """Mean quality over a curve with the logarithm of the density as the axis (trapezoids).

    Every halving of what is left counts alike; None with fewer than two levels.

    Args:
        curve: level (fraction removed, in [0, 1)) -> quality.

    Example:
        >>> curve_mean({0.5: 1.0, 0.75: 0.0})
        0.5
    """
    if len(curve) < 2:
        return None
    axis, values = zip(*sorted((math.log(1 - level), value) for level, value in curve.items()), strict=True)
    area = float(import_module("scipy.integrate").trapezoid(values, axis))
    return area / float(axis[-1] - axis[0])
