"""Whole numbers that the code makes of sizes, and that never become the size of anything: what for, nobody sees.

A bound of a slice, of a list or of an iterator, the number of a diagonal, what is left of a division: Python and torch
take them as plain integers. Where the inputs that were tried are too short for such a bound to show, the cut model
seems right, and another input finds it with another bound than the original's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from secateur.structure.axes import leaves
from secateur.structure.expressions import Apply, Expr, attributes_in, dims_in
from secateur.structure.provenance import Attribute
from secateur.structure.trace import Trace
from secateur.types import Condition

ORDERS = ("lt", "le", "gt", "ge")


def reckoned(trace: Trace, groups: Mapping[str, int], attributes: Collection[Attribute]) -> Iterator[Condition]:
    """One condition for each line that makes such a number of a size that is cut.

    Args:
        trace: of the original.
        groups: name of a group that loses units -> id of its atom.
        attributes: that follow the cut.
    """
    names = {atom: name for name, atom in groups.items()}
    # An order of two numbers is that of the inputs that were tried; all other uses are held to, or follow the cut.
    kept = (use for use in trace.size_uses if not (isinstance(use.expr, Apply) and use.expr.op in ORDERS))
    used = {id(part) for use in kept for part in _parts(use.expr)}
    used.update(id(part) for number in trace.scales for part in _parts(number))
    said: set[str] = set()
    for number in trace.reckoned:
        if id(number.expr) in used or number.place.where in said:
            continue
        cut = [names[leaf.id] for axis in dims_in(number.expr) for leaf in leaves(axis) if leaf.id in names]
        cut += [attribute.name for attribute in attributes_in(number.expr) if attribute in attributes]
        if cut:
            said.add(number.place.where)
            made = f"this line makes {number.axis} of the size of {cut[0]!r}, which is cut"
            text = f"holds while it bounds nothing: {made}, and what for was not seen"
            yield Condition(text, number.place.where, number.place.module)


def _parts(expr: Expr) -> Iterator[Expr]:
    yield expr
    if isinstance(expr, Apply):
        yield from _parts(expr.left)
        yield from _parts(expr.right)
