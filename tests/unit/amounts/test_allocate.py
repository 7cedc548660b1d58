"""Golden values and exact totals."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.amounts.allocate import allocate, apportion, lamp_scores, names, round_half_up
from secateur.amounts.allocate.base import water_fill
from secateur.errors import RecipeError, TargetError


def test_lamp_golden():
    torch.testing.assert_close(lamp_scores(torch.tensor([1.0, 2.0, 3.0])).tolist(), [1 / 14, 4 / 13, 1.0])
    torch.testing.assert_close(lamp_scores(torch.tensor([[20.0], [10.0]])).tolist(), [[1.0], [0.2]])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=20))
def test_lamp_is_its_definition_and_monotone(values):
    score = torch.tensor(values)
    found = lamp_scores(score).numpy()
    order = np.argsort(score.numpy(), kind="stable")
    square = score.numpy().astype(np.float64)[order] ** 2
    for rank in range(len(values) - 1):
        tail = square[rank:].sum()
        assert found[order[rank]] == pytest.approx(square[rank] / tail if tail else 0.0, rel=1e-9, abs=1e-300)
    assert found[order[-1]] == 1.0
    assert (np.diff(found[order]) >= 0).all()


def test_lamp_keeps_the_last_unit_of_every_layer():
    amounts = allocate(
        {"small": torch.rand(5) * 1e-6, "zero": torch.zeros(5), "big": torch.rand(50)}, name="lamp", count=57
    )
    assert amounts.removed is None
    for score in amounts.scores.values():
        assert score.max() == 1.0
        assert int((score == 1.0).sum()) == 1
    with pytest.raises(RecipeError, match="negative"):
        allocate({"a": torch.tensor([-1.0, 1.0])}, name="lamp", count=1)


def test_lamp_tail_keeps_its_digits():
    score = torch.cat([torch.full((1000,), 1e6), torch.tensor([1e-3, 2e-3])])
    found = lamp_scores(score)[-2:].double()
    torch.testing.assert_close(found, torch.tensor([1e-6, 4e-6]).double() / 1e15, rtol=1e-6, atol=0)


SHAPES = {"a": (64, 3, 3, 3), "b": (64, 64, 3, 3), "c": (10, 64)}


def test_erk_golden():
    removed = allocate({name: torch.rand(shape) for name, shape in SHAPES.items()}, name="erk", sparsity=0.9).removed
    for name, density in {"a": 0.670048, "b": 0.057654, "c": 1.0}.items():
        size = int(np.prod(SHAPES[name]))
        assert abs(size - removed[name] - density * size) < 1
    square = {"a": torch.rand(4, 4), "b": torch.rand(8, 8)}
    assert allocate(square, name="erk", sparsity=0.0).removed == {"a": 0, "b": 0}


def test_erk_counts_are_exact():
    scores = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    removed = allocate(scores, name="erk", sparsity=0.9).removed
    assert sum(removed.values()) == 35309
    assert removed["c"] == 0
    floored = allocate(scores, name="erk", sparsity=0.9, min_keep=1500).removed
    assert sum(floored.values()) == 35309
    assert removed["a"] > 228 >= floored["a"]


def test_erk_takes_shapes_of_weights_for_channel_scores():
    scores = {"a": torch.rand(64), "b": torch.rand(64)}
    removed = allocate(scores, {"a": (64, 3, 3, 3), "b": (64, 64, 3, 3)}, name="erk", sparsity=0.5).removed
    assert removed["a"] < removed["b"]
    assert sum(removed.values()) == 64
    with pytest.raises(RecipeError, match="pass shapes"):
        allocate(scores, name="erk", sparsity=0.5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8), st.data()
)
def test_apportion_is_exact_within_bounds_and_fair(rows, data):
    shares = [share for share, _, _ in rows]
    floors, limits = [min(a, b) for _, a, b in rows], [max(a, b) for _, a, b in rows]
    total = data.draw(st.integers(sum(floors), sum(limits)))
    found = apportion(shares, total, limits, floors=floors)
    assert sum(found) == total
    assert all(low <= x <= high for low, x, high in zip(floors, found, limits, strict=True))
    exact = water_fill(shares, Fraction(total), limits, floors=floors)
    assert all(abs(x - y) < 1 for x, y in zip(found, exact, strict=True))
    # One common rate: whoever gets less is at the limit, whoever gets more is at the floor.
    rates = [x / s for x, s in zip(exact, shares, strict=True)]
    for i, rate in enumerate(rates):
        for j, other in enumerate(rates):
            if rate < other:
                assert exact[i] == limits[i] or exact[j] == floors[j]


def test_uniform_total_is_exact():
    scores = {f"l{i}": torch.rand(3) for i in range(7)}
    removed = allocate(scores, name="uniform", sparsity=0.5).removed
    assert sum(removed.values()) == 11
    assert set(removed.values()) == {1, 2}


def test_global_changes_nothing():
    scores = {"a": torch.rand(3)}
    amounts = allocate(scores, name="global", count=2)
    assert amounts.removed is None
    assert amounts.scores["a"] is scores["a"]


def test_requests_are_checked():
    scores = {"a": torch.rand(10)}
    assert names() == ["erk", "global", "lamp", "sensitivity", "uniform"]
    with pytest.raises(RecipeError, match="did you mean 'uniform'"):
        allocate(scores, name="unifrom", count=1)
    with pytest.raises(RecipeError, match="either sparsity or count"):
        allocate(scores)
    with pytest.raises(TargetError, match="0 to 7 units"):
        allocate(scores, count=8, min_keep=3, name="uniform")
    with pytest.raises(TargetError, match="0 to 2"):
        apportion([1], 3, [2])
    assert round_half_up(0.0, 10) == 0
