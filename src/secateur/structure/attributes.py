"""Which attributes follow a cut, and which dimensions must stay because a size in the code would not follow.

Every `SizeUse` says: this expression is the size of that dimension. An attribute that stands alone in a use takes the
dimension's new size; one that appears only in quotients or products is solved for. All uses must then come out right
by arithmetic. Where they do not, dimensions of equal size that shrink together may still satisfy them (a width that is
read from one tensor and used for another, a head count shared by all layers): these are made one index set. An atom
that even this does not help is locked, with the line of code as the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from secateur.structure.axes import (
    Atom,
    Axis,
    Conflict,
    Prod,
    Sum,
    add_lock,
    depends_on,
    leaves,
    product,
    resolve,
    size_after,
)
from secateur.structure.provenance import Apply, Attribute, Dim, Expr, attributes_in, dims_in, evaluate, read
from secateur.structure.trace import SizeUse, Trace
from secateur.types import Lock

MAX_TOGETHER = 64  # atoms that are tried together before an atom is locked


@dataclass(frozen=True, eq=False)
class Definition:
    """How an attribute follows: it is the size of `axis`, changed by `steps` of arithmetic one after the other."""

    axis: Axis
    steps: tuple[tuple[str, Expr], ...] = ()


class Sizes:
    """The uses of a trace, and what they become under a cut."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.present = trace.values
        self.definitions = _definitions(trace)
        self.readers: dict[Attribute, list[SizeUse]] = defaultdict(list)
        for use in trace.size_uses:
            for attribute in attributes_in(use.expr):
                self.readers[attribute].append(use)
        self.by_atom = self._by_atom()

    def _by_atom(self) -> dict[int, dict[int, SizeUse]]:
        """For each atom its own uses, and behind them those that are tied to them by attributes that follow."""
        found: dict[int, dict[int, SizeUse]] = defaultdict(dict)
        for use in self.trace.size_uses:
            sized = [] if isinstance(use.axis, int) else [use.axis]
            for axis in (*sized, *dims_in(use.expr)):
                for atom in leaves(axis):
                    found[atom.id][id(use)] = use
        families = self._families()
        for uses in found.values():
            for family in {id(family): family for family in map(families.__getitem__, uses)}.values():
                uses.update(family)
        return found

    def _families(self) -> dict[int, dict[int, SizeUse]]:
        """For each use all that are tied to it; tied uses have one family together, which is sought once."""
        found: dict[int, dict[int, SizeUse]] = {}
        for use in self.trace.size_uses:
            if id(use) not in found:
                family = self._family(use)
                found.update(dict.fromkeys(family, family))
        return found

    def _family(self, use: SizeUse) -> dict[int, SizeUse]:
        """The use and all that read an attribute which follows it."""
        found, todo = {id(use): use}, [use]
        seen: set[Attribute] = set()
        while todo:
            for attribute in attributes_in(todo.pop().expr):
                if attribute in seen or attribute not in self.definitions:
                    continue
                seen.add(attribute)
                for other in self.readers[attribute]:
                    if id(other) not in found:
                        found[id(other)] = other
                        todo.append(other)
        return found

    def value(self, attribute: Attribute, counts: Mapping[int, int]) -> int:
        """What an attribute becomes (-1: nothing that would fit)."""
        definition = self.definitions.get(attribute)
        if definition is None:
            return self.present[attribute]
        value = size_after(definition.axis, counts)
        for op, expr in definition.steps:
            value = _undo(op, value, self.evaluate(expr, counts))
        return value

    def evaluate(self, expr: Expr, counts: Mapping[int, int]) -> int:
        """Value of an expression after the cut."""
        return evaluate(expr, counts, {a: self.value(a, counts) for a in set(attributes_in(expr))})

    def broken(self, uses: Iterable[SizeUse], counts: Mapping[int, int]) -> SizeUse | None:
        """The first use that would not come out right."""
        for use in uses:
            wanted = use.axis if isinstance(use.axis, int) else size_after(use.axis, counts)
            if self.evaluate(use.expr, counts) != wanted:
                return use
        return None

    def axes(self, use: SizeUse) -> Iterator[Axis]:
        """Dimensions that a use ties together."""
        if not isinstance(use.axis, int):
            yield use.axis
        yield from dims_in(use.expr)
        for attribute in attributes_in(use.expr):
            for reader in self.readers[attribute]:
                if reader.expr is not use.expr and not isinstance(reader.axis, int):
                    yield reader.axis
            definition = self.definitions.get(attribute)
            if definition is not None:
                yield definition.axis


def _definitions(trace: Trace) -> dict[Attribute, Definition]:
    found: dict[Attribute, Definition] = {}
    # Attributes that size a dimension by themselves come first: what arithmetic says of another may stand on them.
    uses = [piece for use in trace.size_uses for piece in _pieces(use, trace.values)]
    for use in uses:
        if isinstance(use.expr, Attribute) and not isinstance(use.axis, int):
            found.setdefault(use.expr, Definition(use.axis))
    for use in uses:
        for attribute, definition in _solved(use, trace.values):
            # Never by way of itself, or its value would be looked up for ever.
            if attribute not in found and attribute not in _reads(definition.steps, found):
                found[attribute] = definition
    return found


def _pieces(use: SizeUse, values: Mapping[Attribute, int]) -> Iterator[SizeUse]:
    """The terms of a sum with the pieces that they size, where a dimension is made of such; else the use as it is.

    One sum says nothing of its terms: solved for the first of them, that one alone would follow what all pieces lose.
    """
    parts = () if isinstance(use.axis, int) else _terms(use.axis)
    terms = [term for term in _added(use.expr) if evaluate(term, {}, values) != 0]
    alike = len(parts) > 1 and [evaluate(term, {}, values) for term in terms] == [part.size for part in parts]
    yield from (replace(use, expr=e, axis=a) for e, a in zip(terms, parts, strict=True)) if alike else (use,)


def _added(expr: Expr) -> list[Expr]:
    sides = (expr.left, expr.right) if isinstance(expr, Apply) and expr.op == "add" else ()
    return [term for side in sides for term in _added(side)] or [expr]


def _undo(op: str, value: int, other: int) -> int:
    """The operand x of `x op other == value` (-1: there is none)."""
    if op == "floordiv":
        return value * other
    if op == "mul":
        return value // other if other > 0 and value % other == 0 else -1
    return value - other if op == "add" else value + other


def _solved(use: SizeUse, values: Mapping[Attribute, int]) -> Iterator[tuple[Attribute, Definition]]:
    """Attributes that sums, products and quotients determine, if they do so now without remainder."""
    expr = use.expr
    if isinstance(expr, Apply) and expr.op == "eq" and use.axis == 1:
        for one, other in ((expr.left, expr.right), (expr.right, expr.left)):
            if isinstance(one, Attribute) and isinstance(other, Dim):
                yield one, Definition(other.axis)
    if isinstance(use.axis, int) or not isinstance(expr, Apply):
        return
    for attribute, steps in _isolated(expr):
        value = use.axis.size
        for op, other in steps:
            value = _undo(op, value, evaluate(other, {}, values))
        if value == values[attribute]:
            yield attribute, Definition(use.axis, steps)


def _isolated(expr: Expr) -> Iterator[tuple[Attribute, tuple[tuple[str, Expr], ...]]]:
    """Every attribute that occurs once, with the operations to undo, outermost first."""
    if isinstance(expr, Attribute):
        yield expr, ()
    if not isinstance(expr, Apply) or expr.op not in ("add", "sub", "mul", "floordiv"):
        return
    sides = [(expr.left, expr.right)]
    if expr.op in ("add", "mul"):
        sides.append((expr.right, expr.left))
    for one, other in sides:
        rest = set(attributes_in(other))
        for attribute, steps in _isolated(one):
            if attribute not in rest:
                yield attribute, ((expr.op, other), *steps)


def _reads(steps: Iterable[tuple[str, Expr]], definitions: Mapping[Attribute, Definition]) -> set[Attribute]:
    """Every attribute that the arithmetic depends on, through definitions too."""
    found: set[Attribute] = set()
    todo = [expr for _, expr in steps]
    while todo:
        for attribute in attributes_in(todo.pop()):
            if attribute not in found:
                found.add(attribute)
                if attribute in definitions:
                    todo += [expr for _, expr in definitions[attribute].steps]
    return found


def settle(trace: Trace, atoms: Iterable[Atom]) -> None:
    """Lock every atom that some size in the code would not follow; unite atoms that have to shrink together.

    Each free atom is changed, once by one and once by half, and the uses that read or size it are evaluated with the
    attributes that follow.
    """
    _factor_widths(trace)
    sizes = Sizes(trace)
    for atom in sorted({a.id: a for each in atoms for a in leaves(each)}.values(), key=lambda a: a.id):
        if atom.locks or atom.bound is not None or atom.id not in sizes.by_atom:
            continue
        together = [atom]
        use = _extend(sizes, together)
        if use is not None:
            add_lock(atom, _reason(use))
            continue
        for other in together[1:]:
            sizes.by_atom[atom.id].update(sizes.by_atom.get(other.id, {}))
            trace.space.unify(atom, other)
            root = resolve(atom)
            assert isinstance(root, Atom)
            sizes.by_atom[root.id] = sizes.by_atom[atom.id]
            atom = root


def _factor_widths(trace: Trace) -> None:
    """Give a width the structure of the product that it sizes: heads times coordinates of a head.

    The common spelling of attention reads the width of its input and uses it for something else: ``c // heads`` as the
    size of a head, or ``c`` itself as the width of all heads together. Neither side can shrink by itself. Where the
    width gets the factors of the other side, both shrink alike: by whole heads, or by the same coordinates of each.
    """
    definitions = _definitions(trace)
    for use in trace.size_uses:
        sides = None if isinstance(use.axis, int) else _two_sides(trace, use.expr, use.axis, definitions)
        if sides is None or not any(isinstance(resolve(side), Prod) for side in sides):
            continue
        if _shrink_alike(*sides):
            continue
        try:
            trace.space.unify(*sides)
        except Conflict:
            for side in sides:
                for atom in leaves(side):
                    add_lock(atom, _reason(use))


def _shrink_alike(a: Axis, b: Axis) -> bool:
    """Whether one side is made of the other's own parts, in another order say: it follows by itself."""
    ids = depends_on(a), depends_on(b)
    return ids[0] <= ids[1] or ids[1] <= ids[0]


def _two_sides(
    trace: Trace, expr: Expr, axis: Axis, definitions: Mapping[Attribute, Definition]
) -> tuple[Axis, Axis] | None:
    """A width that the code reads, and the product that has to stay as large as it; None for other arithmetic."""
    if isinstance(expr, Dim):
        width = expr.axis
        return (width, axis) if width.size == axis.size else None
    if not isinstance(expr, Apply) or expr.op != "floordiv" or not isinstance(expr.left, Dim):
        return None
    width, count = expr.left.axis, evaluate(expr.right, {}, trace.values)
    if count * axis.size != width.size or axis.size == 1 or _shrink_alike(width, axis):
        return None
    known = definitions.get(expr.right) if isinstance(expr.right, Attribute) else None
    if known is not None and known.axis.size == count and not known.steps:
        return width, product([known.axis, axis])
    fixed = Lock("a width is divided by this number", module="")
    return width, product([trace.space.fresh(count, fixed), axis])


def _extend(sizes: Sizes, together: list[Atom]) -> SizeUse | None:
    """Add the atoms that have to shrink along; returns the use that nothing helps, or None."""
    for count in _counts(together[0]):
        while True:
            use = _broken(sizes, together, count)
            if use is None:
                break
            more = _partners(sizes, use, together)
            if not more or len(together) + len(more) > MAX_TOGETHER:
                return use
            together += more
    # Partners come several at once, and some are only of equal size: as many heads as coordinates of a head.
    for other in together[:0:-1]:
        fewer = [atom for atom in together if atom is not other]
        if all(_broken(sizes, fewer, count) is None for count in _counts(other)):
            together[:] = fewer
    return None


def _counts(atom: Atom) -> list[int]:
    """What is tried of an atom: by one shows what must not change at all; by half what merely happens to divide.

    A use that is right at both follows the size, and no list of cases has to say which arithmetic does.
    """
    return sorted({atom.size - 1, max(1, atom.size // 2)}, reverse=True)


def _broken(sizes: Sizes, together: Sequence[Atom], count: int) -> SizeUse | None:
    """The first use that would not come out right if all these atoms had `count` units."""
    uses: dict[int, SizeUse] = {}
    for atom in together:
        uses.update(sizes.by_atom.get(atom.id, {}))
    return sizes.broken(uses.values(), {atom.id: count for atom in together})


def _partners(sizes: Sizes, use: SizeUse, together: list[Atom]) -> list[Atom]:
    """Free atoms of the same size in the dimensions that the use ties, one per dimension."""
    ids = {atom.id for atom in together}
    found: dict[int, Atom] = {}
    for axis in (term for one in sizes.axes(use) for term in _terms(one)):
        below = list(leaves(axis))
        if any(atom.id in ids for atom in below):
            continue  # its factors are not each other's partners
        same = {atom.id: atom for atom in below if atom.size == together[0].size and not atom.locks}
        if len(same) > 1:
            same = {atom.id: atom for atom in _counterparts(sizes, use, ids, axis) if atom.id in same}
        if len(same) == 1:
            (atom,) = same.values()
            if not _nested(axis, atom):
                found[atom.id] = atom
    return list(found.values())


def _counterparts(sizes: Sizes, use: SizeUse, ids: set[int], axis: Axis) -> Iterator[Atom]:
    """Factors of `axis` in the places that atoms `ids` have in dimensions of the same form."""
    factors = _factors(axis)
    for other in (term for one in sizes.axes(use) for term in _terms(one)):
        theirs = _factors(other)
        if [f.size for f in theirs] == [f.size for f in factors]:
            for mine, their in zip(factors, theirs, strict=True):
                if isinstance(their, Atom) and their.id in ids and isinstance(mine, Atom):
                    yield mine


def _factors(axis: Axis) -> list[Axis]:
    node = resolve(axis)
    return [resolve(part) for part in node.parts] if isinstance(node, Prod) else [node]


def _terms(axis: Axis) -> Sequence[Axis]:
    node = resolve(axis)
    return node.parts if isinstance(node, Sum) else (node,)


def _nested(axis: Axis, atom: Atom) -> bool:
    """Whether the atom is a factor that occurs several times."""
    node = resolve(axis)
    return isinstance(node, Prod) and sum(resolve(part) is atom for part in node.parts) > 1


def _reason(use: SizeUse) -> Lock:
    place = use.place
    return Lock(
        "a size computed in the code would not follow the cut",
        place.op,
        place.module,
        place.where,
        "compute the size from the tensor itself (for example with -1) or from an attribute of its own",
    )


def relied_on(trace: Trace, atoms: Iterable[int]) -> dict[Attribute, int]:
    """Attributes that say how dimensions of these atoms are read (so many heads in a width), with their values now."""
    by_atom = Sizes(trace).by_atom
    uses = {id(use): use for atom in atoms for use in by_atom.get(atom, {}).values()}
    return {a: trace.values[a] for use in uses.values() for a in attributes_in(use.expr)}


def edits(model: nn.Module, trace: Trace, counts: Mapping[int, int]) -> dict[Attribute, int]:
    """Attributes that change when the atoms keep `counts`, with their new values."""
    sizes = Sizes(trace)
    changed: dict[Attribute, int] = {}
    for attribute in sizes.definitions:
        value = sizes.value(attribute, counts)
        if value != read(model, attribute):
            changed[attribute] = value
    return changed
