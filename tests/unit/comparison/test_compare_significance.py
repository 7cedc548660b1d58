"""The arithmetic against scipy, closed forms and brute force."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

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
    wanted = stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs])
    low, high = wanted.confidence_interval(0.95)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-6, abs=1e-12)
    assert found.mean - found.half == pytest.approx(low, rel=1e-6, abs=1e-9)
    assert found.mean + found.half == pytest.approx(high, rel=1e-6, abs=1e-9)


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


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9))
def test_kendall_agrees_with_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    found = kendall(left, right)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(stats.kendalltau(left, right).statistic)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9))
def test_spearman_agrees_with_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    found = spearman(left, right)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


def test_curve_mean_of_a_line_in_log_density_is_its_middle() -> None:
    levels = (0.5, 0.75, 0.9)
    ends = [math.log(1 - level) for level in levels]
    line = {level: 2 * x + 5 for level, x in zip(levels, ends, strict=True)}
    for order in permutations(line):
        assert curve_mean({level: line[level] for level in order}) == pytest.approx(5 + ends[0] + ends[-1])
    assert curve_mean({0.5: 1.0}) is None
