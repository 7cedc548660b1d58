"""Exact counts and the total order, against brute force."""

from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.amounts import per_pattern, round_half_up, select
from secateur.errors import InputError, NonFiniteError, RecipeError, TargetError
from secateur.kinds.weights import NM, keep_pattern
from secateur.types import Group

# Few distinct values, signed zeros among them: ties everywhere.
VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.0, -1.0, 0.5])
TENSORS = st.lists(VALUES, min_size=1, max_size=9).map(torch.tensor)
SCORES = st.dictionaries(st.sampled_from(["b", "a", "c", "a.b"]), TENSORS, min_size=1)
FRACTION = st.integers(0, 99).map(lambda n: n / 100)


def exactly(sparsity, n):
    return int((Decimal(str(sparsity)) * n).to_integral_value(ROUND_HALF_UP))


def brute_force(scores, count):
    units = [(value, name, i) for name, score in scores.items() for i, value in enumerate(score.flatten().tolist())]
    gone = {(name, i) for _, name, i in sorted(units)[:count]}
    return {n: [(n, i) not in gone for i in range(s.numel())] for n, s in scores.items()}


def removed(keep):
    return sum(int((~mask).sum()) for mask in keep.values())


def as_lists(keep):
    return {name: mask.flatten().tolist() for name, mask in keep.items()}


@settings(max_examples=200, deadline=None)
@given(SCORES, FRACTION)
def test_global_is_a_sort_by_score_name_index(scores, sparsity):
    count = exactly(sparsity, sum(s.numel() for s in scores.values()))
    expected = brute_force(scores, count)
    assert as_lists(select(scores, sparsity=sparsity)) == expected
    assert as_lists(select(scores, count=count)) == expected
    assert as_lists(select(dict(reversed(scores.items())), count=count)) == expected


@settings(max_examples=100, deadline=None)
@given(SCORES, FRACTION)
def test_local_is_global_group_by_group(scores, sparsity):
    expected = {}
    for name, score in scores.items():
        expected |= brute_force({name: score}, exactly(sparsity, score.numel()))
    assert as_lists(select(scores, sparsity=sparsity, scope="local")) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), FRACTION, st.integers(0, 99), st.booleans())
def test_row_is_global_row_by_row(rows, columns, sparsity, seed, turned):
    score = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.tensor(
        [brute_force({"r": row}, exactly(sparsity, columns))["r"] for row in score], dtype=torch.bool
    )
    group = Group("w", "element", (columns, rows), (), attributes={"out_dim": 1, "in_dim": 0})
    if turned:
        keep = select({"w": score.T}, sparsity=sparsity, scope="row", groups=[group])["w"].T
    else:
        keep = select({"w": score}, sparsity=sparsity, scope="row")["w"]
    assert torch.equal(keep, expected)


@settings(max_examples=100, deadline=None)
@given(SCORES, FRACTION, st.integers(0, 4), st.sampled_from(["global", "local"]))
def test_floors_hold_and_the_total_too(scores, sparsity, min_keep, scope):
    sizes = {name: score.numel() for name, score in scores.items()}
    most = sum(size - min(min_keep, size) for size in sizes.values())
    if scope == "global":
        wanted = exactly(sparsity, sum(sizes.values()))
    else:
        wanted = sum(exactly(sparsity, size) for size in sizes.values())
    if wanted > most:
        with pytest.raises(TargetError, match=f"0 to {most} units"):
            select(scores, sparsity=sparsity, min_keep=min_keep, scope=scope)
        return
    keep = select(scores, sparsity=sparsity, min_keep=min_keep, scope=scope)
    assert removed(keep) == wanted
    assert all(int(mask.sum()) >= min(min_keep, mask.numel()) for mask in keep.values())


def test_floors_spill_to_the_next_units():
    scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
    keep = select(scores, count=3, min_keep=1)
    assert as_lists(keep) == {"a": [False, False, True], "b": [False, True, True]}


@settings(max_examples=100, deadline=None)
@given(SCORES, FRACTION, st.sampled_from(["uniform", "global", "lamp"]))
def test_allocations_remove_exactly_what_was_asked(scores, sparsity, allocation):
    scores = {name: score.abs() for name, score in scores.items()}
    keep = select(scores, sparsity=sparsity, allocation=allocation)
    assert removed(keep) == exactly(sparsity, sum(s.numel() for s in scores.values()))


def test_erk_through_select():
    scores = {"a": torch.rand(64, 3, 3, 3), "b": torch.rand(64, 64, 3, 3), "c": torch.rand(10, 64)}
    keep = select(scores, sparsity=0.9, allocation="erk")
    assert removed(keep) == 35309  # 0.9 * 39232 = 35308.8
    assert keep["c"].all()
    assert int(keep["a"].sum()) == 1158
    keep = select(scores, sparsity=0.9, allocation="erk", min_keep=1400, protect=["c"])
    assert int(keep["a"].sum()) == 1400


def test_all_equal_scores_are_pruned_exactly_from_the_front():
    scores = {"b": torch.ones(3), "a": torch.ones(2, 2)}
    keep = select(scores, count=5)
    assert as_lists(keep) == {"b": [False, True, True], "a": [False] * 4}


def test_half_is_rounded_up_in_decimal():
    assert removed(select({"a": torch.rand(45)}, sparsity=0.7)) == 32  # 31.5; 31.499.. in binary
    assert removed(select({"a": torch.rand(3)}, sparsity=0.5)) == 2


def test_threshold_removes_what_lies_below():
    scores = {"a": torch.tensor([0.1, 0.5, 0.9]), "b": torch.tensor([0.2, 0.3])}
    assert as_lists(select(scores, threshold=0.5)) == {"a": [False, True, True], "b": [False, False]}
    assert as_lists(select(scores, threshold=0.5, min_keep=1))["b"] == [False, True]


def test_named_sets_compete_among_themselves():
    scores = {"enc.0": torch.tensor([1.0, 2.0]), "enc.1": torch.tensor([3.0, 4.0]), "head": torch.tensor([0.0, 9.0])}
    keep = select(scores, sparsity=0.5, scope={"encoder": ["enc"], "rest": ["*"]})
    assert as_lists(keep) == {"enc.0": [False, False], "enc.1": [True, True], "head": [False, True]}
    with pytest.raises(RecipeError, match="no set holds 'head'"):
        select(scores, sparsity=0.5, scope={"encoder": ["enc"]})
    with pytest.raises(RecipeError, match="'decoder' match nothing"):
        select(scores, sparsity=0.5, scope={"all": ["*"], "decoder": ["dec"]})


def test_protected_groups_stay_and_are_not_counted():
    scores = {"head": torch.zeros(10), "body": torch.rand(10)}
    keep = select(scores, sparsity=0.5, protect=["head"])
    assert keep["head"].all()
    assert removed(keep) == 5
    with pytest.raises(RecipeError, match="did you mean 'head'"):
        select(scores, sparsity=0.5, protect=["haed"])
    with pytest.raises(InputError, match="no units"):
        select(scores, sparsity=0.5, protect=["*"])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 5), (9, 16), (9, 17)]),
    st.integers(0, 99),
)
def test_patterns_keep_the_n_highest_of_each_m(rows, columns, pattern, seed):
    n, m = pattern
    score = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    keep = select({"w": score}, granularity=f"{n}:{m}")["w"]
    for row, kept in zip(score.tolist(), keep.tolist(), strict=True):
        for start in range(0, columns - m + 1, m):
            gone = sorted(range(start, start + m), key=lambda i: (row[i], i))[: m - n]
            assert [i for i in range(start, start + m) if not kept[i]] == sorted(gone)
        assert all(kept[columns // m * m :])


def test_scores_that_are_no_number_stay_first():
    """As a sort has them last; and the counts are exact."""
    score = torch.tensor([[float("nan"), 1.0, 2.0, 3.0], [3.0, float("nan"), float("nan"), 0.0]])
    assert keep_pattern(score, 2, 4).tolist() == [[True, False, False, True], [False, True, True, False]]


def test_patterns_run_along_input_channels():
    score = torch.rand(3, 8, 2, 2)
    keep = keep_pattern(score, 2, 4)
    assert torch.equal(keep.unflatten(1, (2, 4)).sum(2), torch.full((3, 2, 2, 2), 2))
    group = Group("w", "n:m", (8, 3), (), attributes={"in_dim": 0, "out_dim": 1})
    turned = select({"w": torch.rand(8, 3)}, granularity=NM(), groups=[group])["w"]
    assert torch.equal(turned.unflatten(0, (2, 4)).sum(1), torch.full((2, 3), 2))


def test_patterns_take_no_other_amount():
    score = {"w": torch.rand(2, 4)}
    assert removed(select(score, granularity="2:4", sparsity=0.5)) == 4
    for wrong in ({"sparsity": 0.6}, {"count": 4}):
        with pytest.raises(RecipeError, match="fixes the sparsity"):
            select(score, granularity="2:4", **wrong)
    for wrong in ({"scope": "row"}, {"min_keep": 1}, {"allocation": "erk"}):
        with pytest.raises(RecipeError, match="nothing else to choose"):
            select(score, granularity="2:4", **wrong)
    with pytest.raises(InputError, match="no dimension 1"):
        select({"w": torch.rand(4)}, granularity="2:4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"sparsity": 0.5, "count": 1}, "not 2"),
        ({"sparsity": 50}, r"write 0\.5"),
        ({"sparsity": 1.0}, "fraction in"),
        ({"sparsity": -0.1}, "fraction in"),
        ({"sparsity": float("nan")}, "finite number"),
        ({"sparsity": True}, "valid number"),
        ({"count": 1.5}, "whole number"),
        ({"count": -1}, "whole number"),
        ({"threshold": float("nan")}, "finite"),
        ({"sparsity": 0.5, "scope": "globl"}, "did you mean 'global'"),
        ({"sparsity": 0.5, "scope": "row"}, "two dimensions"),
        ({"sparsity": 0.5, "allocation": "erkk"}, "did you mean 'erk'"),
        ({"sparsity": 0.5, "allocation": "erk"}, "shape of the weight"),
        ({"sparsity": 0.5, "allocation": "erk", "scope": "local"}, "global sparsity"),
        ({"sparsity": 0.5, "granularity": "elemnt"}, "did you mean 'element'"),
        ({"sparsity": 0.5, "min_keep": -1}, "min_keep"),
        ({"sparsity": 0.5, "protect": "a"}, "write a list"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        select({"a": torch.rand(4)}, **arguments)


def test_unreachable_counts_name_the_range():
    with pytest.raises(TargetError, match="0 to 4 units"):
        select({"a": torch.rand(4)}, count=5)
    with pytest.raises(TargetError, match=r"sparsity 0 to 0\.5"):
        select({"a": torch.rand(2, 4)}, sparsity=0.75, scope="row", min_keep=2)


def test_bad_scores_are_refused():
    score = torch.rand(2, 3)
    score[1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'w' holds nan at index \(1, 0\)"):
        select({"w": score}, sparsity=0.5)
    with pytest.raises(InputError, match="floating-point"):
        select({"w": torch.ones(3, dtype=torch.long)}, sparsity=0.5)
    with pytest.raises(InputError, match="no units"):
        select({}, sparsity=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_layouts(dtype):
    score = torch.randn(4, 6).to(dtype)
    expected = brute_force({"w": score.double()}, 12)
    assert as_lists(select({"w": score}, count=12)) == expected
    assert as_lists(select({"w": score.T.contiguous().T}, count=12)) == expected
    assert removed(select({"w": score, "v": torch.randn(6)}, count=12)) == 12


@pytest.mark.parametrize("scope", ["global", "local", "row"])
def test_many_ties_in_many_units(scope):
    generator = torch.Generator().manual_seed(0)
    scores = {f"l{i}": torch.randint(0, 5, (200, 300), generator=generator).float() for i in range(3)}
    assert removed(select(scores, sparsity=0.37, scope=scope)) == 66600


@settings(max_examples=100, deadline=None)
@given(SCORES, FRACTION, FRACTION, st.sampled_from(["global", "local"]))
def test_patterns_meet_their_own_amounts(scores, first, second, scope):
    """Each set is selected as if it were the whole model."""
    if "b" not in scores or len(scores) < 2:
        return
    rest = {name: score for name, score in scores.items() if name != "b"}
    keep = select(scores, sparsity={"b": first, "*": second}, scope=scope)
    assert list(keep) == list(scores)
    alone = select({"b": scores["b"]}, sparsity=first, scope=scope) | select(rest, sparsity=second, scope=scope)
    assert as_lists(keep) == as_lists(alone)
    if scope == "global":
        assert removed({"b": keep["b"]}) == exactly(first, scores["b"].numel())
        assert removed(keep) - removed({"b": keep["b"]}) == exactly(second, sum(s.numel() for s in rest.values()))


def test_patterns_count_and_protect():
    scores = {"enc.0.w": torch.rand(6), "enc.1.w": torch.rand(6), "head.w": torch.rand(4)}
    keep = select(scores, count={"enc": 5, "head": 0})
    assert removed(keep) == 5
    assert keep["head.w"].all()
    keep = select(scores, sparsity={"enc.0": 0.5, "*": 0.0}, protect=["head"])
    assert removed({"enc.0.w": keep["enc.0.w"]}) == removed(keep) == 3
    keep = select(scores, threshold={"head": 2.0, "*": -1.0})
    assert removed(keep) == removed({"head.w": keep["head.w"]}) == 4
    keep = select(scores, sparsity={"enc": 0.5, "*": 0.0}, allocation="uniform")
    assert [removed({n: keep[n]}) for n in keep] == [3, 3, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": {"enc": 0.5}}, r"no pattern matches 'head\.w'"),
        ({"sparsity": {"haed": 0.5, "*": 0.1}}, "'haed' matches no group"),
        ({"sparsity": {"*": 0.1, "head": 0.5}}, r"'head' has nothing left, all it matches goes to '\*'"),
        ({"sparsity": {"head": 0.5, "*": 0.1}, "protect": ["head"]}, "'head' matches no group"),
        ({"sparsity": {}}, "names no pattern"),
        ({"sparsity": {"*": 1.0}}, "fraction in"),
        ({"sparsity": {"*": 0.1}, "count": 1}, "not 2"),
        ({"count": {"*": 1.5}}, "whole number"),
        ({"sparsity": {"*": 0.1}, "scope": {"all": ["*"]}}, "both name sets"),
        ({"sparsity": {"*": 0.5}, "granularity": "2:4"}, "fixes the sparsity"),
    ],
)
def test_wrong_patterns_are_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        select({"enc.w": torch.rand(2, 4), "head.w": torch.rand(2, 4)}, **arguments)


def test_groups_are_dealt_out_in_order():
    names = ["enc.0", "enc.1", "head", "stem"]
    assert per_pattern(names, {"enc.1": 1, "enc*": 2, "[sh]*": 3}) == [
        (["enc.1"], 1),
        (["enc.0"], 2),
        (["head", "stem"], 3),
    ]
    with pytest.raises(RecipeError, match="amount: the pattern 'x' matches no group"):
        per_pattern(names, {"x": 1, "*": 2}, what="amount")


def test_the_rounding_of_every_selector_is_the_one_of_decimals():
    for sparsity in (n / 100 for n in range(100)):
        for units in (1, 3, 15, 45, 250):
            assert round_half_up(sparsity, units) == exactly(sparsity, units)
            assert removed(select({"a": torch.zeros(units)}, sparsity=sparsity)) == exactly(sparsity, units)
