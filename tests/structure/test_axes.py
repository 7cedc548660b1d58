"""The axis algebra against brute force: every position of a dimension is written out as a set of (atom, unit)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from secateur.structure.axes import (
    MAX_LOCKS,
    ONE,
    Atom,
    Axis,
    Conflict,
    Prod,
    Space,
    add_lock,
    concat,
    depends_on,
    kept,
    leaves,
    lock,
    product,
    resolve,
    size_after,
    touched,
    unit_index,
)
from secateur.types import Lock

Row = tuple[tuple[int, int], ...]


def rows(node: Axis) -> list[Row]:
    """For every position the (atom, unit) pairs that it stands for: no code of the engine but `bound`."""
    while isinstance(node, Atom) and node.bound is not None:
        node = node.bound
    if isinstance(node, Atom):
        return [((node.id, unit),) for unit in range(node.size)]
    parts = [rows(part) for part in node.parts]
    if isinstance(node, Prod):
        out: list[Row] = [()]
        for part in parts:
            out = [a + b for a in out for b in part]
        return out
    return [row for part in parts for row in part]


def build(space: Space, draw: st.DrawFn, depth: int) -> Axis:
    kind = draw(st.sampled_from(["atom", "prod", "sum"] if depth else ["atom"]))
    if kind == "atom":
        return space.fresh(draw(st.sampled_from([1, 2, 3, 4, 6])))
    parts = [build(space, draw, depth - 1) for _ in range(draw(st.integers(2, 3)))]
    return product(parts) if kind == "prod" else concat(parts)


@st.composite
def axes(draw: st.DrawFn, count: int = 1) -> tuple[Space, list[Axis]]:
    space = Space()
    found = [build(space, draw, 2) for _ in range(count)]
    assume(all(axis.size <= 150 for axis in found))
    return space, found


def random_keep(nodes: list[Axis], seed: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    atoms = {atom.id: atom.size for node in nodes for atom in leaves(node)}
    return {i: np.isin(np.arange(n), rng.permutation(n)[: rng.integers(1, n + 1)]) for i, n in atoms.items()}


def stays(node: Axis, keep: dict[int, np.ndarray]) -> list[bool]:
    return [all(keep[atom][unit] for atom, unit in row) for row in rows(node)]


@given(axes(), st.integers(0, 99))
def test_kept_sizes_and_units_are_those_of_the_written_out_dimension(made: tuple[Space, list[Axis]], seed: int) -> None:
    _, [node] = made
    keep = random_keep([node], seed)
    written = rows(node)
    assert len(written) == node.size
    assert kept(node, keep).tolist() == stays(node, keep)
    assert size_after(node, {i: int(mask.sum()) for i, mask in keep.items()}) == sum(stays(node, keep))
    for atom in leaves(node):
        for position, row in enumerate(written):
            units = [index[position] for index in unit_index(node, atom) if index[position] >= 0]
            assert sorted(units) == sorted(unit for i, unit in row if i == atom.id)
    assert depends_on(node) == {i for row in written for i, _ in row}
    assert touched(node, depends_on(node)) == bool(depends_on(node))
    assert not touched(node, {-5})


@given(axes(), st.data(), st.integers(0, 99))
def test_a_product_splits_into_row_major_factors(
    made: tuple[Space, list[Axis]], data: st.DataObject, seed: int
) -> None:
    space, [node] = made
    left = data.draw(st.sampled_from([n for n in range(1, node.size + 1) if node.size % n == 0]))
    try:
        outer, inner = space.split_product(node, left)
    except Conflict:
        return
    assert (outer.size, inner.size) == (left, node.size // left)
    expected = [Counter(a + b) for a in rows(outer) for b in rows(inner)]
    assert [Counter(row) for row in rows(node)] == expected
    keep = random_keep([node], seed)
    assert kept(product([outer, inner]), keep).tolist() == kept(node, keep).tolist()


@given(axes(), st.data())
def test_a_sum_splits_at_any_seam(made: tuple[Space, list[Axis]], data: st.DataObject) -> None:
    space, [node] = made
    at = data.draw(st.integers(0, node.size))
    try:
        low, high = space.split_sum(node, at)
    except Conflict:
        return
    pieces = [piece for piece in (low, high) if piece is not None]
    assert [piece.size for piece in pieces] == [n for n in (at, node.size - at) if n]
    assert [Counter(row) for row in rows(node)] == [Counter(row) for piece in pieces for row in rows(piece)]


@given(axes(count=2), st.integers(0, 99))
def test_what_is_unified_keeps_the_same_positions(made: tuple[Space, list[Axis]], seed: int) -> None:
    space, [a, b] = made
    b = b if a.size == b.size else space.fresh(a.size)
    before = {id(x): x.size for x in (a, b)}
    try:
        space.unify(a, b)
    except Conflict:
        assert all(len(rows(x)) == before[id(x)] for x in (a, b))
        return
    assert [Counter(row) for row in rows(a)] == [Counter(row) for row in rows(b)]
    keep = random_keep([a, b], seed)
    assert kept(a, keep).tolist() == kept(b, keep).tolist()


@given(axes(count=3), st.integers(0, 99))
def test_unification_never_splits_what_was_one(made: tuple[Space, list[Axis]], seed: int) -> None:
    """Positions that shared a unit before still share one: refinement is all that happens."""
    space, [a, b, c] = made
    shared = product([a, b])
    old = rows(shared)
    c = c if c.size == a.size else space.fresh(a.size)
    try:
        space.unify(a, c)
    except Conflict:
        return
    keep = random_keep([shared, c], seed)
    now = stays(shared, keep)
    mask = stays(a, keep)
    other = stays(b, keep)
    assert now == [x and y for x in mask for y in other]
    assert len(old) == len(now)


def test_fused_queries_keys_values_meet_heads() -> None:
    space = Space()
    fused = space.fresh(72)
    three, rest = space.split_product(fused, 3)
    heads, size = space.split_product(rest, 4)
    width = space.fresh(24)
    space.unify(width, product([heads, size]))
    assert (three.size, heads.size, size.size) == (3, 4, 6)
    keep = {resolve(heads).id: np.array([True, False, True, True])}
    assert kept(width, keep).reshape(4, 6).all(1).tolist() == [True, False, True, True]
    assert int(kept(fused, keep).sum()) == 54


def test_unaligned_sums_take_the_finer_cut() -> None:
    space = Space()
    left, right = concat([space.fresh(4), space.fresh(8)]), concat([space.fresh(6), space.fresh(6)])
    space.unify(left, right)
    assert [part.size for part in resolve(left).parts] == [4, 2, 6]
    assert rows(left) == rows(right)


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 2)), ((4, 6), (6, 4))])
def test_products_without_common_refinement_are_a_conflict(a: tuple[int, int], b: tuple[int, int]) -> None:
    space = Space()
    with pytest.raises(Conflict):
        space.unify(product([space.fresh(n) for n in a]), product([space.fresh(n) for n in b]))


def test_other_conflicts() -> None:
    space = Space()
    with pytest.raises(Conflict):
        space.unify(space.fresh(3), space.fresh(4))
    with pytest.raises(Conflict):
        space.split_product(space.fresh(6), 4)
    with pytest.raises(Conflict):
        space.split_sum(product([space.fresh(2), space.fresh(3)]), 4)


def test_locks_reach_what_an_atom_becomes() -> None:
    space = Space()
    atom = space.fresh(6)
    lock(atom, Lock("first"))
    outer, inner = space.split_product(atom, 2)
    assert {reason.reason for part in (outer, inner) for leaf in leaves(part) for reason in leaf.locks} == {"first"}
    other = space.fresh(3)
    space.unify(inner, other)
    assert [reason.reason for leaf in leaves(other) for reason in leaf.locks] == ["first"]
    [leaf] = leaves(other)
    for number in range(10):
        add_lock(leaf, Lock(str(number)))
        add_lock(leaf, Lock(str(number)))
    assert len(leaf.locks) == MAX_LOCKS


def test_dimensions_of_size_one_are_constant() -> None:
    space = Space()
    assert space.fresh(1) is ONE
    assert product([]) is ONE
    assert kept(ONE, {}).tolist() == [True]
    assert resolve(product([ONE, space.fresh(3), ONE])).size == 3
