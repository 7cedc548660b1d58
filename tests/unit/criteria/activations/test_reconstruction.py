"""LASSO, ThiNet and structured OBS against optimality conditions and brute force."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.criteria.activations.lasso import Lasso, _refitted, _score_group
from secateur.criteria.activations.structured_obs import StructuredOBS, surgeon_order
from secateur.criteria.activations.thinet import ThiNet, greedy_order
from secateur.errors import RecipeError
from secateur.statistics.activations.gram import Reading, unit_gram
from secateur.statistics.activations.lasso_path import drop_points, lasso_path, ordered_scores


def problem(seed, rows=40, columns=6, outputs=3, units=None, groups=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, rows, columns)) @ (np.eye(columns) + 0.4 * rng.normal(size=(columns, columns)))
    x = torch.from_numpy(x)
    w = torch.from_numpy(rng.normal(size=(groups, outputs, columns)))
    unit = torch.arange(columns).expand(groups, -1) if units is None else units
    return x, Reading("w", x.transpose(1, 2) @ x / rows, w, unit)


# The path


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(2, 30))
def test_every_point_of_the_path_is_optimal(seed, size, rows):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=(rows, size)), rng.normal(size=rows)
    gram, output = torch.from_numpy(z.T @ z), torch.from_numpy(z.T @ y)
    path = lasso_path(gram, output)
    assert path[-1][0] == 0.0
    scale = float(output.abs().max())
    for (above, first), (below, last) in pairwise(path):
        assert above >= below
        for part in (0.0, 0.3, 1.0):
            lam, beta = (1 - part) * above + part * below, (1 - part) * first + part * last
            slope = output - gram @ beta
            assert float(slope.abs().max()) <= lam + 1e-6 * scale
            active = beta.abs() > 1e-9
            assert torch.allclose(slope[active], lam * beta[active].sign(), atol=1e-6 * scale)


def test_orthogonal_columns_shrink_one_by_one():
    norms = torch.tensor([3.0, 1.0, 2.0]).double()
    gram = torch.diag(norms.square())
    assert drop_points(gram, norms.square()).tolist() == [9.0, 1.0, 4.0]
    for lam, beta in lasso_path(gram, norms.square()):
        torch.testing.assert_close(beta, (1 - lam / norms.square()).clamp(min=0))


def test_dead_columns_never_join():
    gram = torch.diag(torch.tensor([4.0, 0.0, 1.0])).double()
    assert drop_points(gram, gram.diagonal()).tolist() == [4.0, 0.0, 1.0]
    assert drop_points(torch.zeros(2, 2).double(), torch.zeros(2).double()).tolist() == [0.0, 0.0]


def test_equal_columns_do_not_stop_the_path():
    z = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0], [0.0, 0.0, 3.0]]).double()
    gram = z.T @ z
    lam, beta = lasso_path(gram, gram.sum(1))[-1]
    assert lam == 0.0
    torch.testing.assert_close(z @ beta, z.sum(1), rtol=1e-6, atol=1e-6)


def test_the_order_of_scores_is_strict_also_when_scaled():
    order = torch.tensor([3, 1, 0, 2])
    scores = ordered_scores(order, torch.tensor([0.5, 0.4, 0.5, 0.5]).double())
    for factor in (1.0, 1e-3, 7.3):
        assert torch.argsort(scores * factor).tolist() == order.tolist()
        assert len(set((scores * factor).tolist())) == 4


# LASSO


def test_units_of_several_columns_and_fixed_columns():
    units = torch.tensor([[0, 0, 1, 1, 2, -1]])
    x, reading = problem(5, units=units)
    scores = _score_group([reading], 3, 1)
    z = torch.stack([(x[0][:, units[0] == u] @ reading.matrix[0][:, units[0] == u].T).flatten() for u in range(3)])
    gram = z @ z.T
    assert torch.argsort(scores).tolist() == torch.argsort(drop_points(gram, gram.sum(1))).tolist()


def test_survivors_are_refitted_by_least_squares():
    units = torch.tensor([[0, 0, 1, 2, 2, 3], [3, 1, 1, 0, -1, 2]])
    x, reading = problem(5, units=units, groups=2)
    matrix = _refitted(reading, torch.tensor([1, 3]), 4)
    keep = torch.isin(units, torch.tensor([1, 3])) | (units < 0)
    for g in range(2):
        wanted = torch.linalg.lstsq(x[g][:, keep[g]], x[g] @ reading.matrix[g].T).solution.T
        torch.testing.assert_close(matrix[g][:, keep[g]], wanted, rtol=1e-5, atol=1e-6)
        assert float(matrix[g][:, ~keep[g]].abs().max()) == 0.0


@pytest.mark.parametrize("stages", [1, 2, 4, 9])
def test_every_stage_gives_a_whole_order(stages):
    _, reading = problem(8)
    scores = _score_group([reading], 6, stages)
    assert len(set(scores.tolist())) == 6


def test_stages_matter_where_survivors_take_over():
    """Once refitted the survivors carry what was dropped, and the order changes."""
    different = 0
    for seed in range(10):
        _, reading = problem(seed)
        one, many = (torch.argsort(_score_group([reading], 6, stages)).tolist() for stages in (1, 6))
        assert one[0] == many[0]
        different += one != many
    assert different > 0


# ThiNet


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_thinet_takes_the_best_next_unit(seed):
    x, reading = problem(seed)
    gram, _ = unit_gram(reading, 6)
    order, errors = greedy_order(gram)
    z = torch.stack([torch.outer(x[0][:, u], reading.matrix[0][:, u]).flatten() for u in range(6)])
    for step in range(6):
        gone = order[:step].tolist()
        rest = [u for u in range(6) if u not in gone]
        costs = {u: float(z[[*gone, u]].sum(0).square().sum()) / 40 for u in rest}
        assert costs[int(order[step])] == pytest.approx(min(costs.values()), abs=1e-9)
        assert float(errors[step]) == pytest.approx(costs[int(order[step])], abs=1e-9)


# Structured OBS


def refit_error(x, reading, keep):
    total = 0.0
    for g in range(len(x)):
        y = x[g] @ reading.matrix[g].T
        kept = x[g][:, keep[g]]
        total += (
            float((y - kept @ torch.linalg.lstsq(kept, y).solution).square().sum())
            if keep[g].any()
            else float(y.square().sum())
        )
    return total


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_the_predicted_cost_is_the_error_of_the_refit(seed):
    units = torch.tensor([[0, 0, 1, 2, 2, 3], [3, 1, 1, 0, 2, 2]])
    x, reading = problem(seed, units=units, groups=2)
    order, errors = surgeon_order([reading], 4, 1e-11)  # the refit has no damping
    whole = sum(float((a @ w.T).square().sum()) for a, w in zip(x, reading.matrix, strict=True))
    for step in range(1, 4):
        keep = ~torch.isin(units, order[:step])
        assert float(errors[step - 1]) == pytest.approx(refit_error(x, reading, keep) / whole, rel=1e-4, abs=1e-6)


def test_the_first_removal_is_the_best_single_one():
    x, reading = problem(11)
    order, _ = surgeon_order([reading], 6, 1e-9)
    keeps = [torch.arange(6)[None] != u for u in range(6)]
    assert int(order[0]) == int(np.argmin([refit_error(x, reading, keep) for keep in keeps]))


def test_greedy_pairs_are_close_to_the_best_pairs():
    ratios = []
    for seed in range(8):
        x, reading = problem(seed)
        order, _ = surgeon_order([reading], 6, 1e-9)
        best = min(refit_error(x, reading, ~torch.isin(torch.arange(6), torch.tensor(p))[None])
                   for p in combinations(range(6), 2))  # fmt: skip
        ratios.append(refit_error(x, reading, ~torch.isin(torch.arange(6), order[:2])[None]) / best)
    assert float(np.median(ratios)) < 1.2


def test_a_dead_layer_has_no_cost():
    reading = Reading("w", torch.zeros(1, 2, 2).double(), torch.ones(1, 1, 2).double(), torch.arange(2)[None])
    _, errors = surgeon_order([reading], 2)
    assert bool(torch.isfinite(errors).all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lasso(positions=0),
        lambda: Lasso(stages=0),
        lambda: ThiNet(positions=-1),
        lambda: StructuredOBS(damping=0.0),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(RecipeError):
        make()
