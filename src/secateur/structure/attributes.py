"""Which attributes follow a cut, and which dimensions must stay because a size in the code would not follow.

Every `Site` says: this expression is the size of that dimension. Where the expression is an attribute by itself, the
attribute takes the dimension's new size. All other sites must then come out right by arithmetic; an atom whose change
breaks one of them is locked, with the line of code as the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from secateur.structure.axes import Atom, Axis, add_lock, leaves, size_after
from secateur.structure.provenance import (
    Apply,
    Attribute,
    Dim,
    Expr,
    attributes_in,
    evaluate,
    read,
)
from secateur.structure.record import Record, Site
from secateur.types import Lock


def settle(record: Record, atoms: Iterable[Atom]) -> None:
    """Lock every atom that some size in the code would not follow.

    Each free atom is changed by itself, once by one and once by half, and the sites that read or size it are
    evaluated with the attributes that follow directly.
    """
    by_atom = _sites_by_atom(record)
    direct = _direct(record)
    for atom in atoms:
        if atom.locks:
            continue
        for count in {atom.size - 1, max(1, atom.size // 2)}:
            broken = _first_broken(by_atom.get(atom.id, []), direct, {atom.id: count})
            if broken is not None:
                add_lock(atom, _reason(broken))
                break


def _reason(site: Site) -> Lock:
    place = site.place
    return Lock(
        "a size computed in the code would not follow the cut",
        place.op,
        place.module,
        place.where,
        "compute the size from the tensor itself (for example with -1) or from an attribute of its own",
    )


def _sites_by_atom(record: Record) -> dict[int, list[Site]]:
    found: dict[int, dict[int, Site]] = defaultdict(dict)
    readers: dict[Attribute, list[Site]] = defaultdict(list)
    for site in record.sites:
        for attribute in attributes_in(site.expr):
            readers[attribute].append(site)
    for site in record.sites:
        related = [site]
        if isinstance(site.expr, Attribute):
            related += readers[site.expr]
        sized = [] if isinstance(site.axis, int) else [site.axis]
        for axis in (*sized, *_dims(site.expr)):
            for atom in leaves(axis):
                for one in related:
                    found[atom.id][id(one)] = one
    return {atom: list(sites.values()) for atom, sites in found.items()}


def _dims(expr: Expr) -> Iterable[Axis]:
    if isinstance(expr, Dim):
        yield expr.axis
    elif isinstance(expr, Apply):
        yield from _dims(expr.left)
        yield from _dims(expr.right)


def _direct(record: Record) -> dict[Attribute, list[Axis]]:
    """Dimensions of which an attribute is the size."""
    found: dict[Attribute, list[Axis]] = defaultdict(list)
    for site in record.sites:
        if isinstance(site.expr, Attribute) and not isinstance(site.axis, int):
            found[site.expr].append(site.axis)
    return found


def _first_broken(
    sites: Iterable[Site], direct: Mapping[Attribute, list[Axis]], counts: Mapping[int, int]
) -> Site | None:
    for site in sites:
        values: dict[Attribute, int] = {}
        for attribute in attributes_in(site.expr):
            wanted = {size_after(axis, counts) for axis in direct.get(attribute, [])}
            if len(wanted) > 1:
                return site
            values[attribute] = wanted.pop() if wanted else UNKNOWN
        before, after = _sizes(site.axis, counts)
        if UNKNOWN in values.values():
            if before != after:
                return site
        elif evaluate(site.expr, counts, values) != after:
            return site
    return None


def _sizes(axis: Axis | int, counts: Mapping[int, int]) -> tuple[int, int]:
    return (axis, axis) if isinstance(axis, int) else (axis.size, size_after(axis, counts))


UNKNOWN = -1


def edits(model: nn.Module, record: Record, counts: Mapping[int, int]) -> dict[Attribute, int]:
    """Attributes that change when the atoms keep `counts`, with their new values."""
    changed: dict[Attribute, int] = {}
    for attribute, axes in _direct(record).items():
        value = size_after(axes[0], counts)
        if value != read(model, attribute):
            changed[attribute] = value
    return changed
