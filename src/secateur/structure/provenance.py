"""Integers that remember where they came from, so that attributes can follow a cut.

While the model runs, integer attributes of its modules and configs are replaced by `TrackedInt`, and so are the sizes
that `Tensor.shape` returns. Arithmetic builds an expression; when such a number reaches a reshape, the engine learns
which attribute has to change when that dimension is cut. A number without provenance is a literal in the user's code.
"""

from __future__ import annotations

import builtins
import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import nn

from secateur.structure.axes import Axis, size_after

_RANGE = builtins.range
CONTAINERS = (dict, OrderedDict, list, set)
NUMBERS = (int, float, bool, str)
PLAIN = frozenset([*CONTAINERS, bool, int, float, str, tuple, type(None)])
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


class Watcher(Protocol):
    """Who is told what the code does with its integers, other than arithmetic."""

    def compared(self, expr: Apply, result: bool) -> bool:
        """Two integers were compared; returns what the code is told."""

    def left(self, expr: Expr, value: int, how: str) -> None:
        """An integer became something that carries no provenance."""

    def asked_mode(self, training: bool) -> bool:
        """The code branched on `training`; returns what it is told."""


class TrackedInt(int):
    """An int with an expression; every other use sees a plain int."""

    expr: Expr
    watch: Watcher | None

    def __new__(cls, value: int, expr: Expr, watch: Watcher | None = None) -> TrackedInt:  # noqa: D102
        self = super().__new__(cls, value)
        self.expr = expr
        self.watch = watch
        return self

    def _told(self, how: str) -> None:
        if self.watch is not None:
            self.watch.left(self.expr, int(self), how)

    def __hash__(self) -> int:
        self._told("a key")
        return int.__hash__(self)

    def __str__(self) -> str:
        self._told("text")
        return int.__repr__(self)

    __repr__ = __str__

    def __format__(self, form: str) -> str:
        self._told("text")
        return int.__format__(self, form)

    def __bool__(self) -> bool:
        result = int.__bool__(self)
        return result if self.watch is None else self.watch.compared(Apply("ne", self.expr, Const(0)), result)

    def __deepcopy__(self, memo: object) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


class WatchedList(list[Any]):
    """A list of plain values that says when a tracked integer picks one of them."""

    def __getitem__(self, key: Any) -> Any:
        if type(key) is TrackedInt:
            key._told("an index")
        return list.__getitem__(self, key)


class WatchedTuple(tuple[Any, ...]):
    """The same as a tuple."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        if type(key) is TrackedInt:
            key._told("an index")
        return tuple.__getitem__(self, key)


class _Ranges(type):
    """Makes `isinstance(x, range)` and the like true of real ranges."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _RANGE)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, _RANGE)

    def __call__(cls, *bounds: Any) -> range:
        for bound in bounds:
            if type(bound) is TrackedInt:
                bound._told("the bound of a loop")
        return _RANGE(*bounds)


class WatchedRange(metaclass=_Ranges):
    """`range` while a model is captured: an integer that bounds a loop says so; Python asks such an integer nothing."""


@contextmanager
def watched_loops() -> Iterator[None]:
    """Put `WatchedRange` in the place of `range`."""
    builtins.range = WatchedRange  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        builtins.range = _RANGE  # type: ignore[misc]


class TrackedFlag(int):
    """The `training` of a module of the user's: says when the code branches on it."""

    watch: Watcher

    def __new__(cls, value: bool, watch: Watcher) -> TrackedFlag:  # noqa: D102
        self = super().__new__(cls, value)
        self.watch = watch
        return self

    def __bool__(self) -> bool:
        return self.watch.asked_mode(int.__bool__(self))

    def __repr__(self) -> str:
        return repr(int.__bool__(self))


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


def _comparison(name: str) -> Callable[[TrackedInt, object], bool]:
    function = COMPARISONS[name]

    def method(self: TrackedInt, other: object) -> bool:
        if not isinstance(other, int):
            return NotImplemented
        result = function(int(self), int(other))
        if self.watch is None or other is self:
            return result
        return self.watch.compared(Apply(name, self.expr, expr_of(other)), result)

    return method


for _name in set(OPERATORS) - set(COMPARISONS):
    setattr(TrackedInt, f"__{_name}__", _binary(_name, swapped=False))
    setattr(TrackedInt, f"__r{_name}__", _binary(_name, swapped=True))
for _name in COMPARISONS:
    setattr(TrackedInt, f"__{_name}__", _comparison(_name))


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
def tracked_attributes(
    model: nn.Module, values: dict[Attribute, int], watch: Watcher, *, flags: bool = False
) -> Iterator[None]:
    """Replace integer attributes by tracked ones and note their `values`; all is put back on exit.

    Args:
        model: its modules and their configs get tracked integers.
        values: is filled with the attributes as they are.
        watch: is told what the forward does with them.
        flags: also follow `training` of modules that are no classes of torch.
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
                items = (TrackedInt(v, Attribute(path, name, i), watch) for i, v in enumerate(value))
                store[name] = WatchedList(items) if type(value) is list else WatchedTuple(items)
            elif type(value) in (list, tuple) and value and all(type(v) in NUMBERS for v in value):
                store[name] = WatchedList(value) if type(value) is list else WatchedTuple(value)
            elif flags and name == "training" and _is_users(owner):
                store[name] = TrackedFlag(value, watch)
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


def _is_users(owner: object) -> bool:
    """Whether the code of a module is not torch's, which is known to keep its structure in both modes."""
    return isinstance(owner, nn.Module) and not type(owner).__module__.startswith("torch.")


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
