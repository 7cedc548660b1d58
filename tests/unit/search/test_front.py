"""Fronts and volumes against plain definitions, on random results."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.search.front import Goals, front, hypervolume, recommended

GOALS = Goals(("accuracy", "macs", "size"), frozenset({"accuracy"}))


def results(seed: int, count: int = 30) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    # Few values, so that equal ones occur.
    return [dict(zip(GOALS.names, (rng.integers(1, 6, 3) / 6).tolist(), strict=True)) for _ in range(count)]


def worse(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether `one` is nowhere better than `other`."""
    return one["accuracy"] <= other["accuracy"] and one["macs"] >= other["macs"] and one["size"] >= other["size"]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    found = results(seed)
    places = front(found, GOALS)
    for number, one in enumerate(found):
        if number in places:
            assert not any(worse(one, other) and one != other for other in found)
        else:
            assert any(worse(one, found[place]) for place in places)
    assert len({tuple(found[place].values()) for place in places}) == len(places), "equal results count once"
    chosen, why = recommended(found, GOALS)
    assert chosen in places
    assert (f"nearest of {len(places)}" if len(places) > 1 else "no other result") in why


def test_the_unit_of_an_objective_does_not_move_the_recommendation() -> None:
    goals = Goals(("accuracy", "macs"), frozenset({"accuracy"}))
    points = [(0.9, 1.0), (0.88, 0.5), (0.5, 0.4)]
    for unit in (1.0, 1e-6, 1e6):
        found = [{"accuracy": a, "macs": unit * m} for a, m in points]
        assert recommended(found, goals)[0] == 1, "nearly the best in both"
        assert recommended(found[::-1], goals)[0] == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_volume_is_that_of_a_count(seed: int) -> None:
    found = results(seed, 8)
    reference = {"accuracy": 0.0, "macs": 1.0, "size": 1.0}
    # A cube of midpoints: all values are multiples of a sixth, so the count is exact.
    grid = (np.arange(6) + 0.5) / 6
    inside = sum(
        any(one["accuracy"] >= a and one["macs"] <= m and one["size"] <= s for one in found)
        for a in grid for m in grid for s in grid
    )  # fmt: skip
    assert hypervolume(found, GOALS, reference) == pytest.approx(inside / 6**3)


def test_what_lies_outside_of_the_reference_adds_nothing() -> None:
    reference = {"accuracy": 0.5, "macs": 1.0, "size": 1.0}
    assert hypervolume([{"accuracy": 0.4, "macs": 0.1, "size": 0.1}], GOALS, reference) == 0
