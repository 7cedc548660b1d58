"""Numbers that remember the expression they came from, and say when somebody does with them what no expression can."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol, SupportsIndex, cast

from secateur.structure.expressions import COMPARISONS, OPERATORS, Apply, Const, Expr


class Watcher(Protocol):
    """Who is told what the code does with its integers."""

    def compared(self, expr: Apply, result: bool) -> bool:
        """Two integers were compared; returns what the code is told."""

    def left(self, expr: Expr, value: int, how: str) -> None:
        """An integer became something that carries no provenance."""

    def made(self, expr: Apply, value: int) -> None:
        """The code made a whole number of sizes."""

    def divided(self, expr: Expr) -> None:
        """A size went into a fraction."""

    def asked_mode(self, training: bool) -> bool:
        """The code branched on `training`; returns what it is told."""


class TrackedInt(int):
    """An int with an expression; every other use sees a plain int."""

    expr: Expr
    watch: Watcher | None

    def __new__(cls, value: int, expr: Expr | None = None, watch: Watcher | None = None) -> TrackedInt:
        """Without an expression a plain integer, for code that makes numbers of the type of another: `type(n)(3)`."""
        if expr is None:
            return value if isinstance(value, TrackedInt) else int(value)  # type: ignore[return-value]
        self = super().__new__(cls, value)
        self.expr = expr
        self.watch = watch
        return self

    def _told(self, how: str) -> None:
        if self.watch is not None:
            self.watch.left(self.expr, int.__int__(self), how)

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

    def __int__(self) -> int:
        self._told("a plain integer")
        return int.__int__(self)

    __trunc__ = __floor__ = __ceil__ = __int__

    def __round__(self, *digits: SupportsIndex) -> int:
        self._told("a plain integer")
        return int.__round__(self, *digits)

    def __neg__(self) -> TrackedInt:
        return cast(TrackedInt, 0 - self)

    def __deepcopy__(self, memo: object) -> int:
        return int.__int__(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int.__int__(self),)


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


class TrackedFloat(float):
    """A number with a fraction that was computed from sizes: a scale is nobody's business, an integer made of it is."""

    sizes: tuple[TrackedInt, ...]

    def __new__(cls, value: float, sizes: tuple[TrackedInt, ...] = ()) -> TrackedFloat:
        """Without sizes a plain number, as `TrackedInt` is without an expression."""
        sizes = sizes or _sizes_of(value)
        if not sizes:
            return float(value)  # type: ignore[return-value]
        self = super().__new__(cls, value)
        self.sizes = sizes
        return self

    def _told(self, how: str) -> None:
        for size in self.sizes:
            size._told(how)

    def __hash__(self) -> int:
        self._told("a key")
        return float.__hash__(self)

    def __str__(self) -> str:
        self._told("text")
        return float.__repr__(self)

    __repr__ = __str__

    def __format__(self, form: str) -> str:
        self._told("text")
        return float.__format__(self, form)

    def __deepcopy__(self, memo: object) -> float:
        return float.__float__(self)

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float.__float__(self),)


def _sizes_of(value: object) -> tuple[TrackedInt, ...]:
    return value.sizes if isinstance(value, TrackedFloat) else (value,) if isinstance(value, TrackedInt) else ()


def _bare(value: Any) -> Any:
    """A number without its provenance."""
    return int.__int__(value) if isinstance(value, int) else float.__float__(value)


Method = Callable[..., object]


def _binary(name: str, *, swapped: bool) -> Method:
    """Arithmetic that an expression can say; with a fraction it is a scale."""
    function = OPERATORS[name]

    def method(self: TrackedInt, other: object) -> object:
        if isinstance(other, float):
            return _fraction(function, self, other, swapped=swapped)
        if type(other) is not int and type(other) is not bool and not isinstance(other, TrackedInt):
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        made = Apply(name, expr_of(a), expr_of(b))
        value = function(_bare(a), _bare(b))
        if self.watch is not None:
            self.watch.made(made, value)
        return TrackedInt(value, made, self.watch)

    return method


def _fraction(function: Callable[..., object], self: float, other: float, *, swapped: bool) -> object:
    a, b = (other, self) if swapped else (self, other)
    value = function(_bare(a), _bare(b))
    for size in (*_sizes_of(a), *_sizes_of(b)):
        if size.watch is not None:
            size.watch.divided(size.expr)
    return TrackedFloat(value, (*_sizes_of(a), *_sizes_of(b))) if isinstance(value, float) else value


def _to_fraction(name: str, *, swapped: bool) -> Method:
    """Arithmetic with a fraction: quotients, powers, and everything that is done to them."""
    function: Callable[..., object] = getattr(operator, name)

    def method(self: float, other: float) -> object:
        if not isinstance(other, int) and type(other) not in (float, TrackedFloat):
            return NotImplemented
        return _fraction(function, self, other, swapped=swapped)

    return method


def _comparison(name: str) -> Method:
    function = COMPARISONS[name]

    def method(self: TrackedInt, other: object) -> bool:
        if isinstance(other, float):
            self._told("a comparison")
            return function(_bare(self), _bare(other))
        if not isinstance(other, int):
            return cast(bool, NotImplemented)
        result = function(_bare(self), _bare(other))
        if self.watch is None or other is self:
            return result
        return self.watch.compared(Apply(name, self.expr, expr_of(other)), result)

    return method


def _telling(kind: type, name: str, how: str) -> Method:
    """A method of a plain number whose result nobody can follow."""
    plain = getattr(kind, name)

    def method(self: TrackedInt | TrackedFloat, *others: object) -> object:
        self._told(how)
        return plain(self, *others)

    return method


def _equip() -> None:
    """Give both kinds of numbers all the methods that Python's numbers have: none may lose its provenance unseen."""
    for name in set(OPERATORS) - set(COMPARISONS):
        setattr(TrackedInt, f"__{name}__", _binary(name, swapped=False))
        setattr(TrackedInt, f"__r{name}__", _binary(name, swapped=True))
    for name in COMPARISONS:
        setattr(TrackedInt, f"__{name}__", _comparison(name))
        setattr(TrackedFloat, f"__{name}__", _telling(float, f"__{name}__", "a comparison"))
    for name in ("truediv", "pow", "add", "sub", "mul"):
        for kind in (TrackedInt, TrackedFloat) if name in ("truediv", "pow") else (TrackedFloat,):
            setattr(kind, f"__{name}__", _to_fraction(name, swapped=False))
            setattr(kind, f"__r{name}__", _to_fraction(name, swapped=True))
    for name in ("divmod", "and", "or", "xor", "lshift", "rshift"):
        for side in ("", "r"):
            setattr(TrackedInt, f"__{side}{name}__", _telling(int, f"__{side}{name}__", "a plain integer"))
    for name in ("invert", "bit_length"):
        full = f"__{name}__" if name == "invert" else name
        setattr(TrackedInt, full, _telling(int, full, "a plain integer"))
    for name in ("int", "trunc", "floor", "ceil", "round", "floordiv", "rfloordiv", "mod", "rmod", "divmod", "rdivmod"):
        setattr(TrackedFloat, f"__{name}__", _telling(float, f"__{name}__", "an integer, by way of a fraction"))


_equip()
