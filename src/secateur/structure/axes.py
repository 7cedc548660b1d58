"""The axis algebra: every tensor dimension is an expression over atomic index sets.

An `Atom` is an index set of some size. A dimension is an atom, a `Prod` (row-major product, what a reshape
makes) or a `Sum` (ordered concatenation, what cat and split make). Two dimensions that an operation forces to be
indexed alike are unified; an atom that turns out to have inner structure is bound to the finer expression.
The cost of every step depends on the number of terms, never on the width of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import lcm, prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from secateur.types import Lock

MAX_LOCKS = 4  # reasons kept per atom: enough to explain, bounded in long networks

Axis: TypeAlias = "Atom | Prod | Sum"
Keep = Mapping[int, npt.NDArray[np.bool_]]


class Conflict(Exception):
    """Two index structures that have no common refinement. Callers lock both sides."""


class Atom:
    """A set of `size` indices; after union or refinement it points to what it became."""

    __slots__ = ("bound", "id", "locks", "multiple", "size")

    def __init__(self, id_: int, size: int) -> None:
        self.id = id_
        self.size: int = size
        self.bound: Axis | None = None
        self.locks: list[Lock] = []
        self.multiple = 1  # of which the number of kept indices has to be a multiple


class Prod:
    """Row-major product of factors; `Prod(())` is the dimension of size one."""

    __slots__ = ("finer", "parts", "size")

    def __init__(self, parts: Sequence[Axis]) -> None:
        self.parts = tuple(parts)
        self.finer: Axis | None = None  # what it became when a factor was refined; found again by `resolve`
        self.size: int = prod(p.size for p in self.parts)


class Sum:
    """Ordered concatenation of terms."""

    __slots__ = ("finer", "parts", "size")

    def __init__(self, parts: Sequence[Axis]) -> None:
        self.parts = tuple(parts)
        self.finer: Axis | None = None
        self.size: int = sum(p.size for p in self.parts)


ONE = Prod(())


def product(parts: Sequence[Axis]) -> Axis:
    """Product of dimensions, flattened; factors of size one vanish."""
    flat: list[Axis] = []
    for part in map(resolve, parts):
        flat.extend(part.parts if isinstance(part, Prod) else [part])
    return flat[0] if len(flat) == 1 else Prod(flat) if flat else ONE


def concat(parts: Sequence[Axis]) -> Axis:
    """Concatenation of dimensions, flattened."""
    flat: list[Axis] = []
    for part in map(resolve, parts):
        flat.extend(part.parts if isinstance(part, Sum) else [part])
    return flat[0] if len(flat) == 1 else Sum(flat)


def resolve(node: Axis) -> Axis:
    """The finest known form of the top level of `node`."""
    if isinstance(node, Atom):
        if node.bound is None:
            return node
        end = resolve(node.bound)
        node.bound = end  # path compression
        return end
    if node.finer is not None:
        node.finer = resolve(node.finer)
        return node.finer
    for part in node.parts:  # a plain loop: this runs a hundred times per operation
        if isinstance(part, Atom) and part.bound is not None:
            node.finer = product(node.parts) if isinstance(node, Prod) else concat(node.parts)
            return node.finer
    return node


def leaves(node: Axis) -> Iterator[Atom]:
    """All unbound atoms below `node`, left to right, with repetition."""
    node = resolve(node)
    if isinstance(node, Atom):
        yield node
    else:
        for part in node.parts:
            yield from leaves(part)


def lock(node: Axis, reason: Lock) -> None:
    """Forbid every cut below `node`."""
    for atom in leaves(node):
        add_lock(atom, reason)


def add_lock(atom: Atom, reason: Lock) -> None:
    """Note one more reason, keeping a bounded number of distinct ones."""
    if len(atom.locks) < MAX_LOCKS and reason not in atom.locks:
        atom.locks.append(reason)


def is_data(node: Axis) -> bool:
    """Whether nothing below `node` can be cut: a size of it changes with the input only."""
    below = list(leaves(node))
    return bool(below) and all(atom.locks for atom in below)


def same_axis(a: Axis, b: Axis) -> bool:
    """Whether two dimensions are indexed alike, as far as that is known."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Atom) or isinstance(b, Atom) or len(a.parts) != len(b.parts):
        return False
    return all(same_axis(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def depends_on(node: Axis) -> set[int]:
    """Ids of the atoms below `node`."""
    return {atom.id for atom in leaves(node)}


class Space:
    """Makes atoms and holds the operations that refine or unify them."""

    def __init__(self) -> None:
        self.atoms: list[Atom] = []
        self.version = 0  # rises with every refinement and union: what was derived from older forms is stale then

    def fresh(self, size: int, reason: Lock | None = None) -> Atom | Prod:
        """A new dimension of `size`; size one is the constant `ONE`."""
        if size == 1:
            return ONE
        atom = Atom(len(self.atoms), size)
        if reason is not None:
            atom.locks.append(reason)
        self.atoms.append(atom)
        return atom

    def _bind(self, atom: Atom, node: Axis) -> None:
        self.version += 1
        atom.bound = node
        for leaf in leaves(node):
            leaf.multiple = lcm(leaf.multiple, atom.multiple)
            for reason in atom.locks:
                add_lock(leaf, reason)

    def split_product(self, node: Axis, left: int) -> tuple[Axis, Axis]:
        """Write `node` as a row-major product of sizes `left` and `node.size // left`.

        Raises:
            Conflict: the known structure of the node does not allow it.
        """
        node = resolve(node)
        right = node.size // left
        if left * right != node.size:
            raise Conflict
        if left == 1 or right == 1:
            return (ONE, node) if left == 1 else (node, ONE)
        if isinstance(node, Atom):
            parts = (self.fresh(left), self.fresh(right))
            self._bind(node, Prod(parts))
            return parts
        if isinstance(node, Sum):
            if any(part.size % right for part in node.parts):
                raise Conflict
            halves = [self.split_product(part, part.size // right) for part in node.parts]
            for _, inner in halves[1:]:
                self.unify(halves[0][1], inner)
            return Sum([outer for outer, _ in halves]), resolve(halves[0][1])
        return self._split_factors(node.parts, left)

    def _split_factors(self, parts: Sequence[Axis], left: int) -> tuple[Axis, Axis]:
        taken: list[Axis] = []
        for i, part in enumerate(parts):
            if left == 1:
                return product(taken), product(parts[i:])
            if left % part.size == 0:
                taken.append(part)
                left //= part.size
                continue
            if part.size % left:
                raise Conflict
            outer, inner = self.split_product(part, left)
            return product([*taken, outer]), product([inner, *parts[i + 1 :]])
        return product(taken), ONE

    def split_sum(self, node: Axis, at: int) -> tuple[Axis | None, Axis | None]:
        """Write `node` as a concatenation cut at position `at` (None = empty side).

        Raises:
            Conflict: the cut would go through the middle of a product.
        """
        node = resolve(node)
        if at <= 0 or at >= node.size:
            return (None, node) if at <= 0 else (node, None)
        if isinstance(node, Atom):
            parts = (self.fresh(at), self.fresh(node.size - at))
            self._bind(node, Sum(parts))
            return parts
        if isinstance(node, Sum):
            return self._split_terms(node.parts, at)
        head, rest = node.parts[0], product(node.parts[1:])
        if at % rest.size:
            raise Conflict
        low, high = self.split_sum(head, at // rest.size)
        return product([low or ONE, rest]), product([high or ONE, rest])

    def _split_terms(self, parts: Sequence[Axis], at: int) -> tuple[Axis, Axis]:
        before: list[Axis] = []
        for i, part in enumerate(parts):
            if at == 0:
                return concat(before), concat(parts[i:])
            if part.size <= at:
                before.append(part)
                at -= part.size
                continue
            low, high = self.split_sum(part, at)
            return concat([*before, low or ONE]), concat([high or ONE, *parts[i + 1 :]])
        raise Conflict

    def unify(self, a: Axis, b: Axis) -> None:
        """State that `a` and `b` are indexed alike.

        Raises:
            Conflict: sizes differ, or the structures have no common refinement.
        """
        a, b = resolve(a), resolve(b)
        if a is b:
            return
        if a.size != b.size:
            raise Conflict
        if isinstance(a, Atom) or isinstance(b, Atom):
            self._unify_atom(a, b)
        elif isinstance(a, Prod) and isinstance(b, Prod):
            self._unify_products(a, b)
        else:
            self._unify_sums(a, b)

    def _unify_atom(self, a: Axis, b: Axis) -> None:
        if isinstance(a, Atom) and isinstance(b, Atom) and b.id < a.id:
            a, b = b, a  # the older atom survives: names stay stable
        atom, other = (b, a) if isinstance(b, Atom) else (a, b)
        assert isinstance(atom, Atom)
        self._bind(atom, other)

    def _unify_products(self, a: Prod, b: Prod) -> None:
        left, right = list(a.parts), list(b.parts)
        while left and right:
            x, y = resolve(left[0]), resolve(right[0])
            if x.size == y.size:
                self.unify(x, y)
                left, right = left[1:], right[1:]
            elif x.size < y.size:
                outer, inner = self.split_product(y, x.size)
                self.unify(x, outer)
                left, right = left[1:], [inner, *right[1:]]
            else:
                outer, inner = self.split_product(x, y.size)
                self.unify(outer, y)
                left, right = [inner, *left[1:]], right[1:]

    def _unify_sums(self, a: Axis, b: Axis) -> None:
        # Piece by piece up to the next seam of either side. A product is cut at seams too, where they fall between
        # its outer positions; where they do not, `split_sum` says that the two have no common structure.
        rest_a: Axis | None = a
        rest_b: Axis | None = b
        while rest_a is not None and rest_b is not None:
            x, y = resolve(rest_a), resolve(rest_b)
            if not isinstance(x, Sum) and not isinstance(y, Sum):
                self.unify(x, y)
                return
            step = min(n.parts[0].size for n in (x, y) if isinstance(n, Sum))
            low_a, rest_a = self.split_sum(x, step)
            low_b, rest_b = self.split_sum(y, step)
            assert low_a is not None
            assert low_b is not None
            self.unify(low_a, low_b)


def kept(node: Axis, keep: Keep) -> npt.NDArray[np.bool_]:
    """[size] bool: which positions of the dimension stay when the atoms keep `keep` (absent = all)."""
    node = resolve(node)
    if isinstance(node, Atom):
        found = keep.get(node.id)
        return np.ones(node.size, bool) if found is None else found
    if isinstance(node, Sum):
        return np.concatenate([kept(part, keep) for part in node.parts])
    mask = np.ones(1, bool)
    for part in node.parts:
        mask = np.logical_and.outer(mask, kept(part, keep)).reshape(-1)
    return mask


def size_after(node: Axis, counts: Mapping[int, int]) -> int:
    """Size of the dimension when atom `i` keeps `counts[i]` indices (absent = all). No index lists."""
    node = resolve(node)
    if isinstance(node, Atom):
        return counts.get(node.id, node.size)
    sizes = [size_after(part, counts) for part in node.parts]
    return sum(sizes) if isinstance(node, Sum) else prod(sizes)


def touched(node: Axis, ids: frozenset[int] | set[int]) -> bool:
    """Whether any atom below `node` is in `ids`."""
    return any(atom.id in ids for atom in leaves(node))


def unit_index(node: Axis, atom: Atom) -> list[npt.NDArray[np.int64]]:
    """Position -> unit of `atom` (-1 = none), one array per occurrence of the atom in a product.

    Example:
        Three heads of two coordinates: the positions 0 to 5 of their product belong to

        >>> space = Space()
        >>> heads, coordinates = space.fresh(3), space.fresh(2)
        >>> unit_index(product([heads, coordinates]), heads)[0].tolist()
        [0, 0, 1, 1, 2, 2]
        >>> unit_index(product([heads, coordinates]), coordinates)[0].tolist()
        [0, 1, 0, 1, 0, 1]
    """
    node = resolve(node)
    if node is atom:
        return [np.arange(atom.size)]
    if isinstance(node, Atom):
        return []
    if isinstance(node, Sum):
        return _index_of_sum(node, atom)
    found = []
    before, after = 1, node.size
    for part in node.parts:
        after //= part.size
        for inner in unit_index(part, atom):
            found.append(np.tile(np.repeat(inner, after), before))
        before *= part.size
    return found


def _index_of_sum(node: Sum, atom: Atom) -> list[npt.NDArray[np.int64]]:
    per_part = [unit_index(part, atom) for part in node.parts]
    depth = max(map(len, per_part))
    blank = [np.full(part.size, -1) for part in node.parts]
    return [
        np.concatenate([found[i] if i < len(found) else blank[j] for j, found in enumerate(per_part)])
        for i in range(depth)
    ]
