"""The list of removals against an order made by hand: exact fractions, sorted tuples."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.amounts.order import removal_order, removals_for
from secateur.errors import RecipeError, TargetError

VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 0.5, 1e-9])
TENSORS = st.lists(VALUES, min_size=1, max_size=7).map(torch.tensor)
SCORES = st.dictionaries(st.sampled_from(["b", "a", "c", "a.b"]), TENSORS, min_size=1)


def by_hand(scores, scope, min_keep):
    """(group, unit) in the order in which they go."""
    entries = []
    for name, score in scores.items():
        ranked = sorted(range(len(score)), key=lambda i, s=score: (float(s[i]), i))
        for rank, unit in enumerate(ranked[: max(len(score) - min_keep, 0)]):
            worth = float(score[unit]) if scope == "global" else Fraction(rank + 1, len(score))
            entries.append((worth, name, rank, unit))
    return [(name, unit) for _, name, _, unit in sorted(entries)]


@settings(max_examples=150, deadline=None)
@given(SCORES, st.sampled_from(["global", "local"]), st.integers(0, 2), st.integers(0, 20))
def test_the_list_is_a_sort(scores, scope, min_keep, removals):
    order = removal_order(scores, scope=scope, min_keep=min_keep)
    expected = by_hand(scores, scope, min_keep)
    assert [(order.names[g], int(u)) for g, u in zip(order.group, order.unit, strict=True)] == expected
    gone = set(expected[:removals])
    keep = order.keep(removals)
    assert {n: m.tolist() for n, m in keep.items()} == {
        n: [(n, i) not in gone for i in range(len(s))] for n, s in scores.items()
    }
    assert order.kept_counts(removals) == {name: int(mask.sum()) for name, mask in keep.items()}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 60))
def test_local_groups_shrink_alike(sizes, removals):
    """No group is ahead of the fraction that all have reached, and none is a whole unit behind it."""
    scores = {f"g{i}": torch.rand(size) for i, size in enumerate(sizes)}
    kept = removal_order(scores, scope="local", min_keep=0).kept_counts(removals)
    gone = [Fraction(size - kept[f"g{i}"], size) for i, size in enumerate(sizes)]
    reached = max(gone)
    assert all(reached - Fraction(1, size) <= share for share, size in zip(gone, sizes, strict=True))


def test_a_group_of_one_is_the_last_to_be_emptied():
    order = removal_order({"a": torch.tensor([-5.0]), "b": torch.rand(10)}, scope="local", min_keep=0)
    assert [order.names[g] for g in order.group] == ["b"] * 9 + ["a", "b"]


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(1, 4), st.integers(0, 20))
def test_rounded_counts_are_multiples_and_the_first_of_the_list_go(scores, step, removals):
    order = removal_order(scores, min_keep=0, round_to=step)
    plain = removal_order(scores, min_keep=0)
    for name, mask in order.keep(removals).items():
        size, exact = len(mask), plain.kept_counts(removals)[name]
        kept = int(mask.sum())
        assert kept == min(size, -(-exact // step) * step)
        ranked = [int(u) for g, u in zip(plain.group, plain.unit, strict=True) if plain.names[g] == name]
        assert sorted(ranked[: size - kept]) == [i for i in range(size) if not mask[i]]


def test_the_shortest_prefix_meets_the_limit():
    order = removal_order({"a": torch.arange(9.0), "b": torch.arange(4.0)}, min_keep=1)
    for limit in range(2, 14):
        found = removals_for(order, lambda n: sum(order.kept_counts(n).values()), limit, "units")
        assert 13 - found == min(limit, 13)
    with pytest.raises(TargetError, match="the least is 2; now it is 13"):
        removals_for(order, lambda n: sum(order.kept_counts(n).values()), 1, "units")


def test_other_scopes_are_refused():
    with pytest.raises(RecipeError, match="did you mean 'local'"):
        removal_order({"a": torch.rand(3)}, scope="locl")
