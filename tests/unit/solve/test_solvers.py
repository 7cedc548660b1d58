"""Solvers of single layers against the mathematics, in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from secateur.errors import NonFiniteError, RecipeError, UnsupportedError
from secateur.solve import SOLVERS, Problem, SecondMoments, error_of
from secateur.solve.least_squares import polish
from secateur.solve.patterns import BlockPattern, Fixed, NofM, PerLayer, PerRow
from secateur.solve.swap import refine

OUT, D, T = 12, 16, 200
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def layer(o=OUT, d=D, seed=0, damping=0.01, spread=1.5, tokens=T):
    """A weight and the moments of correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    rows = torch.randn(tokens, d, generator=g, dtype=torch.float64) @ mix
    rows = rows * torch.exp(spread * torch.randn(d, generator=g, dtype=torch.float64))
    weight = torch.randn(o, d, generator=g, dtype=torch.float64)
    return weight, SecondMoments(rows.T @ rows / tokens, damping=damping)


def least_squares(weight, mask, hessian):
    """The best weights under a mask, row by row, by solving normal equations."""
    found = torch.zeros_like(weight)
    for i, keep in enumerate(mask):
        if keep.any():
            found[i, keep] = torch.linalg.solve(hessian[keep][:, keep], (hessian @ weight[i])[keep])
    return found


PATTERNS = [
    PerRow(OUT * D // 2),
    PerLayer(OUT * D // 2),
    PerRow(101),
    PerLayer(37),
    NofM(2, 4),
    NofM(1, 5),
    BlockPattern(4, 4, 5),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("name", SOLVERS.names())
def test_counts_are_exact_and_zeros_are_positive(name, pattern):
    weight, moments = layer()
    weight[2, :7] = 0  # ties
    problem = Problem(weight, moments, pattern)
    if name == "sparsegpt" and isinstance(pattern, BlockPattern):
        with pytest.raises(UnsupportedError, match="blocks"):
            SOLVERS.find(name)().solve(problem)
        return
    if name == "swap" and isinstance(pattern, BlockPattern):
        pytest.skip("single weights change places there")
    solved = SOLVERS.find(name)().solve(problem)
    assert int((~solved.mask).sum()) == pattern.removed((OUT, D))
    gone = solved.weight[~solved.mask]
    assert bool((gone == 0).all())
    assert not bool(torch.signbit(gone).any())
    if isinstance(pattern, NofM):
        full = D // pattern.m * pattern.m
        assert bool((solved.mask[:, :full].reshape(OUT, -1, pattern.m).sum(-1) == pattern.n).all())
        assert bool(solved.mask[:, full:].all())
    if isinstance(pattern, PerRow):
        per_row = (~solved.mask).sum(1)
        assert int(per_row.max() - per_row.min()) <= 1 + (name == "sparsegpt") * (D // 128 + 1)
    if isinstance(pattern, BlockPattern):
        blocks = solved.mask.reshape(OUT // 4, 4, D // 4, 4).float().mean((1, 3))
        assert set(blocks.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("pattern", [PerLayer(0), PerRow(OUT * D)], ids=repr)
@pytest.mark.parametrize("name", SOLVERS.names())
def test_nothing_and_everything_can_go(name, pattern):
    weight, moments = layer()
    solved = SOLVERS.find(name)().solve(Problem(weight, moments, pattern))
    expected = weight if pattern.count == 0 else torch.zeros_like(weight)
    torch.testing.assert_close(solved.weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "ria"])
def test_scores_are_those_that_were_published(score):
    weight, moments = layer()
    size, norm = weight.abs(), moments.gram.diagonal().sqrt()
    expected = {
        "magnitude": size,
        "wanda": size * norm,
        "ria": (size / size.sum(0) + size / size.sum(1)[:, None]) * norm**0.5,
    }[score]
    torch.testing.assert_close(SOLVERS.find(score)().score(Problem(weight, moments, PerRow(3))), expected, **EXACT)


# -- SparseGPT ---------------------------------------------------------------------------------------------------------


def naive_sparsegpt(weight, hessian, choose, block):
    """Optimal Brain Surgeon, column by column, with the inverse of what is left computed anew for every column.

    `choose(score, j, start, stop)` gives the mask of columns start:stop; it is asked where a block begins.
    """
    weight, (o, d) = weight.clone(), weight.shape
    mask = torch.ones(o, d, dtype=torch.bool)
    for j in range(d):
        if j % block == 0:
            stop = min(j + block, d)
            # The diagonal of the inverse of H restricted to columns c and after.
            bend = torch.stack([torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(j, stop)])
            mask[:, j:stop] = choose(weight[:, j:stop] ** 2 / bend, j, stop)
        inverse = torch.linalg.inv(hessian[j:, j:])
        for i in range(o):
            if not mask[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[0, 0] * inverse[0]
                weight[i, j] = 0
    return mask, weight


@pytest.mark.parametrize("block", [4, 5, 16, 128])
def test_sparsegpt_is_the_naive_algorithm_column_by_column(block):
    weight, moments = layer(6, 14)
    total, d = 40, 14

    def choose(score, start, stop):
        count = total * stop // d - total * start // d
        flat = score.flatten().argsort()[:count]
        keep = torch.ones(score.numel(), dtype=torch.bool)
        keep[flat] = False
        return keep.view_as(score)

    mask, expected = naive_sparsegpt(weight, moments.damped, choose, block)
    solved = SOLVERS.build("sparsegpt", {"block": block}).solve(Problem(weight, moments, PerLayer(total)))
    assert torch.equal(solved.mask, mask)
    torch.testing.assert_close(solved.weight, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("block", [4, 6, 128])
def test_sparsegpt_of_n_of_m_is_naive_too_and_does_not_depend_on_blocks(block):
    weight, moments = layer(6, 14)

    def choose(score, start, stop):
        return NofM(2, 4).keep(score) if stop - start == 4 else torch.ones_like(score, dtype=torch.bool)

    mask, expected = naive_sparsegpt(weight, moments.damped, choose, 4)
    solved = SOLVERS.build("sparsegpt", {"block": block}).solve(Problem(weight, moments, NofM(2, 4)))
    assert torch.equal(solved.mask, mask)
    torch.testing.assert_close(solved.weight, expected, rtol=1e-8, atol=1e-9)


def test_the_factor_of_sparsegpt():
    _, moments = layer()
    upper = moments.upper
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(moments.damped), rtol=1e-7, atol=1e-12)
    assert torch.equal(upper, upper.triu())
    for j in (0, 5, D - 1):
        expected = torch.linalg.inv(moments.damped[j:, j:])[0, 0]
        torch.testing.assert_close(upper[j, j] ** 2, expected, rtol=1e-8, atol=0.0)


def test_sparsegpt_with_independent_inputs_moves_nothing():
    weight, _ = layer()
    solved = SOLVERS.build("sparsegpt", {}).solve(
        Problem(weight, SecondMoments(3 * torch.eye(D).double()), PerLayer(90))
    )
    assert torch.equal(solved.mask, PerLayer(90).keep(weight.abs()))
    torch.testing.assert_close(solved.weight, weight * solved.mask, **EXACT)


def test_rows_do_not_depend_on_each_other():
    weight, moments = layer()
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(1))
    for name in ("wanda", "sparsegpt", "admm", "least_squares"):
        pattern = NofM(2, 4)
        one = SOLVERS.find(name)().solve(Problem(weight, moments, pattern))
        other = SOLVERS.find(name)().solve(Problem(weight[order], moments, pattern))
        assert torch.equal(one.mask[order], other.mask)
        torch.testing.assert_close(one.weight[order], other.weight, **EXACT)


# -- masked least squares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wanda", "magnitude"])
def test_conjugate_gradients_reach_masked_least_squares(name):
    weight, moments = layer()
    found = SOLVERS.find(name)().solve(Problem(weight, moments, PerLayer(100)))
    expected = least_squares(weight, found.mask, moments.damped)
    got = polish(weight, found.weight, found.mask, moments, 200, tolerance=1e-13)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_every_step_of_conjugate_gradients_lowers_the_error():
    weight, moments = layer()
    mask = PerRow(OUT * D // 2).keep(weight.abs())
    errors = [error_of(weight - weight * mask, moments.damped)]
    polish(
        weight,
        weight,
        mask,
        moments,
        8,
        tolerance=1e-12,
        watch=lambda v: errors.append(error_of(weight - v, moments.damped)),
    )
    assert len(errors) == 9
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))


def test_no_solver_is_better_than_least_squares_on_its_own_mask():
    weight, moments = layer()
    for name in SOLVERS.names():
        solved = SOLVERS.find(name)().solve(Problem(weight, moments, PerLayer(100)))
        best = error_of(weight - least_squares(weight, solved.mask, moments.damped), moments.damped)
        assert error_of(weight - solved.weight, moments.damped) >= best * (1 - 1e-9)


# -- ADMM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["gradual", "rising"])
def test_admm_under_a_fixed_mask_goes_to_least_squares(schedule):
    weight, moments = layer(damping=0.1, spread=0.5)
    mask = PerRow(OUT * D // 2).keep(weight.abs())
    options = {"steps": 3000 if schedule == "gradual" else 100, "polish": 0, "schedule": schedule}
    solved = SOLVERS.build("admm", options).solve(Problem(weight, moments, Fixed(mask)))
    expected = least_squares(weight, mask, moments.damped)
    best, plain = (error_of(weight - v, moments.damped) for v in (expected, weight * mask))
    assert error_of(weight - solved.weight, moments.damped) < best + (plain - best) * (
        1e-6 if schedule == "gradual" else 0.05
    )


def test_admm_by_its_definition():
    """Two steps written out with inverses, without any of the shortcuts."""
    weight, moments = layer()
    scale = moments.damped.diagonal().sqrt()
    unit = moments.damped / scale[:, None] / scale
    inverse, start = torch.linalg.inv(unit + 0.7 * torch.eye(D).double()), weight * scale
    kept, dual = start, torch.zeros_like(start)
    for share in (1 - 0.5**3, 1.0):
        free = (start @ unit + 0.7 * (kept - dual)) @ inverse
        mask = PerLayer(90).keep((free + dual).abs(), share)
        kept = (free + dual) * mask
        dual = dual + free - kept
    solved = SOLVERS.build("admm", {"steps": 2, "choosing": 2, "penalty": 0.7, "polish": 0}).solve(
        Problem(weight, moments, PerLayer(90))
    )
    assert torch.equal(solved.mask, mask)
    torch.testing.assert_close(solved.weight, kept / scale, **EXACT)


def test_admm_is_better_than_sparsegpt_and_that_is_better_than_wanda():
    errors = {}
    for name in ("wanda", "sparsegpt", "admm"):
        total = 0.0
        for seed in range(3):
            weight, moments = layer(32, 48, seed=seed, spread=0.7)
            solved = SOLVERS.find(name)().solve(Problem(weight, moments, PerLayer(32 * 24)))
            total += error_of(weight - solved.weight, moments.damped)
        errors[name] = total
    assert errors["admm"] < 0.95 * errors["sparsegpt"] < 0.95**2 * errors["wanda"]


@pytest.mark.parametrize("name", SOLVERS.names())
def test_the_scale_of_the_inputs_does_not_matter(name):
    weight, moments = layer()
    other = SecondMoments(moments.gram * 64.0)  # a power of two, so that nothing is rounded differently
    one, two = (SOLVERS.find(name)().solve(Problem(weight, m, PerRow(96))) for m in (moments, other))
    assert torch.equal(one.mask, two.mask)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-7, atol=1e-9)


# -- swaps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [None, 4])
def test_swaps_lower_the_error_until_no_single_swap_does(run):
    weight, moments = layer(4, 12)
    pattern = PerRow(24) if run is None else NofM(2, 4)
    first = pattern.keep(weight.abs() * moments.norms)
    mask = refine(weight, first, moments.gram, rounds=1000, run=run)

    def error(row, keep):
        gone = weight[row] * ~keep
        return float(gone @ moments.gram @ gone)

    for row in range(4):
        assert mask[row].sum() == first[row].sum()
        here = error(row, mask[row])
        assert here <= error(row, first[row])
        for back in (~mask[row]).nonzero().flatten().tolist():
            for gone in mask[row].nonzero().flatten().tolist():
                if run is not None and back // run != gone // run:
                    continue
                other = mask[row].clone()
                other[back], other[gone] = True, False
                assert error(row, other) >= here * (1 - 1e-6)
    if run is not None:
        assert bool((mask.reshape(4, -1, 4).sum(-1) == 2).all())


# -- moments -----------------------------------------------------------------------------------------------------------


def test_inputs_that_are_always_zero_go_first_and_count():
    weight, _ = layer()
    rows = torch.randn(T, D, generator=torch.Generator().manual_seed(3)).double()
    rows[:, 4] = 0
    for name in ("wanda", "sparsegpt", "admm", "least_squares"):
        moments = SecondMoments(rows.T @ rows / T)
        solved = SOLVERS.find(name)().solve(Problem(weight, moments, PerRow(OUT * 3)))
        assert int((~solved.mask).sum()) == OUT * 3
        assert not bool(solved.mask[:, 4].any())
        assert bool(torch.isfinite(solved.weight).all())


def test_damping_is_raised_until_the_moments_can_be_factorised_and_says_so():
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    gram = rows.T @ rows / 3 - 1e-3 * torch.eye(8).double()  # as rounding may leave it
    moments = SecondMoments(gram, damping=0.0)
    assert bool(torch.isfinite(moments.inverse(0.0)).all())
    assert 0 < moments.damping < 1
    assert SecondMoments(rows.T @ rows / 3, damping=0.01).damping == 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_moments_that_are_no_numbers_are_refused(bad):
    gram = torch.eye(4).double()
    gram[1, 2] = bad
    with pytest.raises(NonFiniteError, match="NaN"):
        SecondMoments(gram)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("admm", {"steps": 0}),
        ("admm", {"penalty": 0.0}),
        ("admm", {"schedule": "sudden"}),
        ("admm", {"stepps": 3}),
        ("sparsegpt", {"block": 0}),
        ("least_squares", {"mask": "least_squares"}),
        ("least_squares", {"mask": "nothing"}),
        ("swap", {"mask": "admm"}),
    ],
)
def test_wrong_options_are_refused(name, options):
    with pytest.raises(RecipeError):
        SOLVERS.build(name, options)


# -- ADMM's shortcuts on wide layers -----------------------------------------------------------------------------------

WIDE = 700  # above what a fifth of the columns is enough for


def by_its_definition(weight, moments, counts, solver):
    """Algorithm 2 in float64 numpy, masks by a sort of every row in every step."""
    gram, goal = moments.damped.double().numpy(), weight.double().numpy()
    scale = np.sqrt(np.diag(gram))
    unit, start = gram / scale[:, None] / scale, goal * scale
    inverse = np.linalg.inv(unit + solver.penalty * np.eye(len(unit)))
    kept, dual = start, np.zeros_like(start)
    for step in range(solver.steps):
        both = (start @ unit + solver.penalty * (kept - dual)) @ inverse + dual
        if step < solver.choosing:
            gone = round(counts * (1 - (1 - (step + 1) / solver.choosing) ** 3))
            mask = np.ones(both.shape, dtype=bool)
            np.put_along_axis(mask, np.argsort(np.abs(both), axis=1, kind="stable")[:, :gone], False, axis=1)
        kept = both * mask
        dual = both - kept
    return torch.from_numpy(kept / scale)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_shortcuts_of_admm_cost_no_quality(monkeypatch, bfloat16):
    """Masks of early steps come from a part of the columns, and products are rounded: the result is as good."""
    monkeypatch.setattr("secateur.solve.admm.multiplies_bfloat16", lambda like: bfloat16)
    weight, moments = layer(24, WIDE, spread=0.5, tokens=4 * WIDE)
    solver = SOLVERS.build("admm", {})
    single = SecondMoments(moments.gram.float())
    solved = solver.solve(Problem(weight.float(), single, PerRow(24 * WIDE // 2)))
    assert (solved.mask.sum(1) == WIDE // 2).all()
    slow = by_its_definition(weight, single, WIDE // 2, solver)
    found, wanted = (error_of(weight - one.double(), moments.damped) for one in (solved.weight, slow))
    assert found < 1.02 * wanted
    assert wanted < 0.5 * error_of(weight * ~solved.mask, moments.damped)


@pytest.mark.parametrize("pattern", [PerRow(30 * 350), PerLayer(30 * 350)], ids=repr)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_masks_in_between_miss_their_count_by_little(pattern, share):
    score = torch.rand(30, WIDE, generator=torch.Generator().manual_seed(1)).exp()
    near, exact = pattern.nearly(score, share), pattern.keep(score, share)
    assert abs(int(near.sum()) - int(exact.sum())) <= 0.02 * score.numel()
    assert (near != exact).float().mean() < 0.06
    narrow = score[:, :16]
    few = type(pattern)(narrow.numel() // 2)
    assert abs(int(few.nearly(narrow, share).sum()) - int(few.keep(narrow, share).sum())) <= len(narrow)


@pytest.mark.parametrize("penalty", [0.0, 1e-4, 0.5])
def test_an_inverse_leaves_the_moments_as_they_were(penalty):
    _, moments = layer()
    before = moments.normalised.clone()
    found = moments.inverse(penalty)
    assert torch.equal(moments.normalised, before)
    torch.testing.assert_close(found, torch.linalg.inv(before + penalty * torch.eye(D).double()), **EXACT)


def test_inverses_in_single_precision_are_those_of_double():
    """Where the penalty bounds the ratio of the eigenvalues; with a small one or none double precision is taken."""
    _, moments = layer(4, 200, damping=1e-7)
    single = SecondMoments(moments.gram.float(), damping=1e-7)
    for penalty, tolerance in ((0.5, 1e-4), (1e-6, 1e-4), (0.0, 1e-4)):
        unit = single.normalised.double()
        wanted = torch.linalg.inv(unit + penalty * torch.eye(200).double())
        found = single.inverse(penalty).double()
        assert float((found - wanted).norm() / wanted.norm()) < tolerance
