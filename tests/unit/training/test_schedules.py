"""Schedules: the formula at every step, exact ends, monotone between them, the last update on the end."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.training import schedules
from secateur.training.schedules import Schedule, schedule_of

NAMES = schedules.names()
sparsities = st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(sorted)
spans = st.tuples(st.integers(0, 50), st.integers(0, 300)).map(lambda pair: (pair[0], sum(pair)))


def density(initial: float, final: float, share: np.ndarray) -> np.ndarray:
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** share


# Share of the time (float64) -> sparsity, written down anew from the papers.
FORMULAS = {
    "one_shot": lambda i, f, t: np.full_like(t, f),
    "linear": lambda i, f, t: i + t * (f - i),
    "custom": lambda i, f, t: i + t * (f - i),
    "cubic": lambda i, f, t: f + (i - f) * (1 - t) ** 3,
    "exponential": density,
    "steps": lambda i, f, t: i + (f - i) * (np.floor(t * 4 + 1e-9) + 1) / 5,
    "cycles": lambda i, f, t: density(i, f, (np.floor(t * 4 + 1e-9) + 1) / 5),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_step_has_the_value_of_the_formula(name: str) -> None:
    schedule = schedule_of(name, final=0.9, initial=0.1, begin=7, end=107, every=10)
    time = np.clip((np.arange(0, 150, dtype=np.float64) - 7) / 100, 0, 1)
    wanted = FORMULAS[name](np.float64(0.1), np.float64(0.9), time)
    wanted[:7] = 0.1
    np.testing.assert_allclose([schedule.at(step) for step in range(150)], wanted, rtol=0, atol=1e-12)


def test_the_cubic_values_that_are_known() -> None:
    known = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
    cubic = schedule_of("cubic", final=0.9, end=10)
    np.testing.assert_allclose([cubic.at(step) for step in range(11)], known, atol=5e-15)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(ends=sparsities, span=spans, every=st.integers(1, 40))
def test_ends_are_exact_and_sparsity_never_falls(
    name: str, ends: list[float], span: tuple[int, int], every: int
) -> None:
    (initial, final), (begin, end) = ends, span
    schedule = schedule_of(name, final=final, initial=initial, begin=begin, end=end, every=every)
    values = [schedule.at(step) for step in range(schedule.end + 3)]
    assert values[: schedule.begin] == [initial] * schedule.begin
    assert values[schedule.end :] == [final] * 3
    # A power may be off by a last digit; whatever is not a power may not fall at all.
    slack = 1e-14 if name in ("exponential", "cycles") else 0.0
    assert all(later >= earlier - slack for earlier, later in pairwise(values))
    assert all(initial <= value <= final for value in values)
    updates = list(schedule.updates())
    assert updates == sorted(set(updates))
    assert updates[0] == schedule.begin
    assert updates[-1] == schedule.end


@pytest.mark.parametrize("name", ["steps", "cycles"])
def test_between_the_cuts_nothing_changes(name: str) -> None:
    schedule = schedule_of(name, final=0.9, begin=3, end=43)
    assert list(schedule.updates()) == [3, 13, 23, 33, 43]
    held = {schedule.at(step) for step in range(13, 23)}
    assert len(held) == 1


def test_a_schedule_of_ones_own_is_one_class() -> None:
    class Root(Schedule):
        name, summary = "root", "the root of the time"

        def between(self, time: float) -> float:
            return self.initial + (self.final - self.initial) * time**0.5

    schedules.register(Root)
    try:
        assert schedule_of("root", final=0.8, end=4).at(1) == pytest.approx(0.4)
        assert schedule_of("root", final=0.8, end=4).at(4) == 0.8
    finally:
        schedules.base.SCHEDULES.remove("root")


def test_a_function_that_leaves_the_way_is_brought_back() -> None:
    wild = schedule_of(lambda time: 3 * time - 1, final=0.6, initial=0.2, end=10)
    assert [wild.at(step) for step in (0, 1, 8, 10)] == [0.2, 0.2, 0.6, 0.6]


@pytest.mark.parametrize(
    "wrong",
    [
        {"spec": "cubix", "final": 0.5},
        {"spec": {"name": "cubic", "power": 2}, "final": 0.5},
        {"spec": "cubic", "final": 1.0},
        {"spec": "cubic", "final": 0.5, "initial": 0.6},
        {"spec": "cubic", "final": 0.5, "begin": 5, "end": 4},
        {"spec": "cubic", "final": 0.5, "every": 0},
        {"spec": {"name": "steps", "count": 0}, "final": 0.5},
        {"spec": {"name": "cycles", "rounds": 1.5}, "final": 0.5},
        {"spec": 3, "final": 0.5},
    ],
)
def test_what_is_wrong_is_refused(wrong: dict) -> None:
    with pytest.raises(RecipeError):
        schedule_of(**wrong)


def test_a_function_that_gives_no_number_is_refused() -> None:
    with pytest.raises(RecipeError, match="returned"):
        schedule_of(lambda time: float("nan"), final=0.5, end=3).at(1)
