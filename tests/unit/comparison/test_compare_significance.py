"""The arithmetic against closed forms, brute force and other doors of scipy."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.comparison.significance import curve_mean, holm, kendall, paired, spearman

numbers = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8))
def test_paired_agrees_with_scipy(pairs: list[tuple[float, float]]) -> None:
    left, right = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    found = paired(left, right)
    differences = [a - b for a, b in pairs]
    spread = max(differences) - min(differences)
    if spread < 1e-6:
        assert found.p is None
        return
    from scipy import stats  # half a thousand modules, in the worker alone that needs them

    wanted = stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs])
    low, high = wanted.confidence_interval(0.95)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-6, abs=1e-12)
    assert found.mean - found.half == pytest.approx(low, rel=1e-6, abs=1e-9)
    assert found.mean + found.half == pytest.approx(high, rel=1e-6, abs=1e-9)


@given(st.lists(numbers, min_size=2, max_size=3), st.floats(0.5, 0.99))
def test_two_and_three_pairs_have_closed_forms(differences: list[float], confidence: float) -> None:
    """Student's t with one degree of freedom is Cauchy's distribution; with two it is an algebraic function."""
    mean, count = sum(differences) / len(differences), len(differences)
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    if error < 1e-6:
        return
    found = paired(dict(enumerate(differences)), dict.fromkeys(range(count), 0.0), confidence=confidence)
    t, c = abs(mean) / error, confidence
    wanted_p = 1 - 2 / math.pi * math.atan(t) if count == 2 else 1 - t / math.sqrt(2 + t * t)
    wanted_half = math.tan(math.pi * c / 2) if count == 2 else c * math.sqrt(2 / (1 - c * c))
    assert found.p == pytest.approx(wanted_p, rel=1e-6, abs=1e-9)
    assert found.half == pytest.approx(wanted_half * error, rel=1e-6)


@pytest.mark.parametrize(("count", "factor"), [(3, 2.48), (5, 1.24), (10, 0.72)])
def test_width_of_an_interval_in_standard_deviations(count: int, factor: float) -> None:
    found = paired({s: float((-1) ** s * (s + 1)) for s in range(count)}, dict.fromkeys(range(count), 0.0))
    assert found.half / found.sd == pytest.approx(factor, abs=0.005)


def test_only_shared_seeds_count_and_equal_differences_prove_nothing() -> None:
    found = paired({0: 1.0, 1: 2.0, 7: 9.0}, {0: 0.5, 1: 1.5, 3: 0.0})
    assert (found.pairs, found.mean, found.half, found.p) == (2, 0.5, 0.0, None)
    assert paired({0: 0.9}, {0: 0.8}).p is None
    assert math.isnan(paired({0: 1.0}, {1: 1.0}).mean)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(values: dict[str, float]) -> None:
    corrected = holm(dict(values))
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for place, (p, name) in enumerate(sorted((p, name) for name, p in values.items())):
            if p > alpha / (len(values) - place):
                break
            rejected.add(name)
        borderline = {n for n, p in corrected.items() if math.isclose(p, alpha, rel_tol=1e-9)}
        assert {name for name, p in corrected.items() if p <= alpha} - borderline == rejected - borderline
    assert all(corrected[name] >= p for name, p in values.items())


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


pairs_with_ties = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9)


@given(pairs_with_ties)
def test_kendall_counts_pairs(pairs: list[tuple[int, int]]) -> None:
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    found = kendall(left, right)
    signs = [(sign(a - c), sign(b - d)) for (a, b), (c, d) in combinations(pairs, 2)]
    untied = [sum(s[side] != 0 for s in signs) for side in (0, 1)]
    if 0 in untied:
        assert found is None
    else:
        assert found == pytest.approx(sum(a * b for a, b in signs) / math.sqrt(untied[0] * untied[1]))


@given(pairs_with_ties)
def test_spearman_is_the_correlation_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    from scipy import stats

    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    found = spearman(left, right)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert found is None
    else:
        # A value's mean rank: those below it, and half of those that tie with it.
        ranks = [[sum((b < a) + (b == a) / 2 for b in side) for a in side] for side in (left, right)]
        assert found == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-12)
        assert found == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


@given(st.permutations(range(8)))
def test_equal_and_opposite_orders(order: list[int]) -> None:
    assert spearman(order, [10.0 * v for v in order]) == 1.0
    assert spearman(order, [-v for v in order]) == -1.0
    assert kendall(order, [v**3 for v in order]) == pytest.approx(1.0)
    assert kendall(order, [-v for v in order]) == pytest.approx(-1.0)


def test_curve_mean_of_a_line_in_log_density_is_its_middle() -> None:
    levels = (0.5, 0.75, 0.9)
    ends = [math.log(1 - level) for level in levels]
    line = {level: 2 * x + 5 for level, x in zip(levels, ends, strict=True)}
    for order in permutations(line):
        assert curve_mean({level: line[level] for level in order}) == pytest.approx(5 + ends[0] + ends[-1])
    assert curve_mean({0.5: 1.0}) is None
