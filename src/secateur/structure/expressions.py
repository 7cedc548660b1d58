"""Expressions of integers: attributes, sizes of dimensions, literals, and arithmetic on them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from secateur.structure.axes import Axis, size_after

COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
OPERATORS: dict[str, Callable[[int, int], int]] = {
    **COMPARISONS,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}


@dataclass(frozen=True)
class Attribute:
    """An integer stored on a module or config: `owner` is its dotted path, `item` the place in a tuple or list."""

    owner: str
    name: str
    item: int | None = None


@dataclass(frozen=True, eq=False)
class Dim:
    """The size of a tensor dimension."""

    axis: Axis


@dataclass(frozen=True)
class Const:
    """A literal."""

    value: int


@dataclass(frozen=True)
class Apply:
    """An arithmetic operation on two expressions."""

    op: str
    left: Attribute | Dim | Const | Apply
    right: Attribute | Dim | Const | Apply


Expr = Attribute | Dim | Const | Apply


def evaluate(expr: Expr, counts: Mapping[int, int], attributes: Mapping[Attribute, int]) -> int:
    """Value of the expression after a cut that leaves `counts` and sets `attributes`."""
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, Dim):
        return size_after(expr.axis, counts)
    if isinstance(expr, Attribute):
        return attributes[expr]
    right = evaluate(expr.right, counts, attributes)
    if expr.op in ("floordiv", "mod") and right == 0:
        return -1
    return OPERATORS[expr.op](evaluate(expr.left, counts, attributes), right)


def attributes_in(expr: Expr) -> Iterator[Attribute]:
    """Every attribute that the expression reads."""
    if isinstance(expr, Attribute):
        yield expr
    elif isinstance(expr, Apply):
        yield from attributes_in(expr.left)
        yield from attributes_in(expr.right)


def dims_in(expr: Expr) -> Iterator[Axis]:
    """Every dimension whose size the expression reads."""
    if isinstance(expr, Dim):
        yield expr.axis
    elif isinstance(expr, Apply):
        yield from dims_in(expr.left)
        yield from dims_in(expr.right)


def is_literal(expr: Expr) -> bool:
    """Whether the expression reads no attribute and no dimension."""
    if isinstance(expr, Apply):
        return is_literal(expr.left) and is_literal(expr.right)
    return isinstance(expr, Const)
