"""Integers that remember where they came from, so that attributes can follow a cut.

While the model runs, integer attributes of its modules and configs are replaced by `TrackedInt`, and so are the sizes
that `Tensor.shape` returns. Arithmetic builds an expression; when such a number reaches a reshape, the engine learns
which attribute has to change when that dimension is cut. A number without provenance is a literal in the user's code.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from secateur.structure.axes import Axis, size_after

CONTAINERS = (dict, OrderedDict, list, set)
PLAIN = frozenset([*CONTAINERS, bool, int, float, str, tuple, type(None)])
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "eq": operator.eq,
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
Watch = Callable[[Expr], None]


class TrackedInt(int):
    """An int with an expression; every other use sees a plain int."""

    expr: Expr
    watch: Watch | None

    def __new__(cls, value: int, expr: Expr, watch: Watch | None = None) -> TrackedInt:  # noqa: D102
        self = super().__new__(cls, value)
        self.expr = expr
        self.watch = watch
        return self

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and self.watch is not None and isinstance(other, int) and other is not self:
            self.watch(Apply("eq", self.expr, expr_of(other)))
        return equal

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    __hash__ = int.__hash__

    def __deepcopy__(self, memo: object) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def expr_of(value: int) -> Expr:
    """The expression of a tracked int, or the literal."""
    return value.expr if isinstance(value, TrackedInt) else Const(int(value))


def _binary(name: str, *, swapped: bool) -> Callable[[TrackedInt, Any], Any]:
    function = OPERATORS[name]

    def method(self: TrackedInt, other: Any) -> Any:
        if type(other) is not int and not isinstance(other, TrackedInt):
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        return TrackedInt(function(int(a), int(b)), Apply(name, expr_of(a), expr_of(b)), self.watch)

    return method


for _name in set(OPERATORS) - {"eq"}:
    setattr(TrackedInt, f"__{_name}__", _binary(_name, swapped=False))
    setattr(TrackedInt, f"__r{_name}__", _binary(_name, swapped=True))


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


def is_literal(expr: Expr) -> bool:
    """Whether the expression reads no attribute and no dimension."""
    if isinstance(expr, Apply):
        return is_literal(expr.left) and is_literal(expr.right)
    return isinstance(expr, Const)


def owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(dotted path, object) of every module and of the config objects that modules hold; each object once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        yield path, module
        for name, value in vars(module).items():
            if _is_config(value) and id(value) not in seen:
                seen.add(id(value))
                yield f"{path}.{name}" if path else name, value


def _is_config(value: object) -> bool:
    if type(value) in PLAIN or isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return False
    name = type(value).__name__
    if name.endswith(("Config", "Args", "Arguments", "Namespace")):
        return True
    return dataclasses.is_dataclass(value) and not getattr(value, "__dataclass_params__").frozen  # noqa: B009


def owner_at(model: nn.Module, path: str) -> Any:
    """The module or config object at a dotted path of `owners`."""
    target: Any = model
    for part in path.split(".") if path else []:
        target = target._modules[part] if part in getattr(target, "_modules", {}) else vars(target)[part]
    return target


def read(model: nn.Module, attribute: Attribute) -> int:
    """Current value of an attribute."""
    value = vars(owner_at(model, attribute.owner))[attribute.name]
    value = value if attribute.item is None else value[attribute.item]
    return cast(int, value if value is None else int(value))  # None: a config's "the default"


def write(model: nn.Module, attribute: Attribute, value: int) -> None:
    """Set an attribute, keeping the container type of tuples and lists."""
    store = vars(owner_at(model, attribute.owner))
    if attribute.item is None:
        store[attribute.name] = value
        return
    old = store[attribute.name]
    store[attribute.name] = type(old)(value if i == attribute.item else item for i, item in enumerate(old))


@contextmanager
def tracked_attributes(model: nn.Module, values: dict[Attribute, int], watch: Watch) -> Iterator[None]:
    """Replace integer attributes by tracked ones and note their `values`; all is put back on exit.

    Args:
        model: its modules and their configs get tracked integers.
        values: is filled with the attributes as they are.
        watch: is told every equality that the forward relies on.
    """
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    held: list[tuple[Any, Any]] = []
    for path, owner in owners(model):
        store = vars(owner)
        before = dict(store)
        saved.append((store, before))
        for name, value in before.items():
            if type(value) in CONTAINERS:
                held.append((value, value.copy() if value else ()))
            if type(value) is int:
                values[Attribute(path, name)] = value
                store[name] = TrackedInt(value, Attribute(path, name), watch)
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                values.update({Attribute(path, name, i): v for i, v in enumerate(value)})
                store[name] = type(value)(TrackedInt(v, Attribute(path, name, i), watch) for i, v in enumerate(value))
    try:
        yield
    finally:
        for store, before in saved:
            for name in [name for name in store if name not in before]:
                del store[name]
            for name, value in before.items():
                if store.get(name) is not value:
                    store[name] = value
        for container, content in held:  # caches that a forward fills would outlive the cut
            if (container or content) and not _same(container, content):
                _refill(container, content)


def _same(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(key in b and b[key] is value for key, value in a.items())
    return all(x is y for x, y in zip(a, b, strict=True))


def _refill(container: Any, before: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(before)
    else:
        container.update(before)
