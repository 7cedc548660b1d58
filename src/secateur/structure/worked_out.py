"""What expressions of plain numbers come to in code that is running: read from its source, worked out beside it.

A plain number tells nobody where it goes. Its expression can be read, and worked out again with the values that names
have: as long as nothing in it is called that could do something else.
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.structure.source import COMPREHENSIONS, Position, SourcePart, is_inside

Made = Any  # whatever an expression comes to
UNKNOWN: Made = object()  # a call that may do something, a name without a value yet
LONGEST = 4096  # items of what is made of numbers
DEEPEST = 4  # names behind names
BINARY: dict[type[ast.operator], Callable[[Made, Made], Made]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
}  # fmt: skip
UNARY: dict[type[ast.unaryop], Callable[[Made], Made]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_, ast.Invert: operator.invert,
}  # fmt: skip
COMPARED: dict[type[ast.cmpop], Callable[[Made, Made], Made]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
# What these give depends on what they are given, and they do nothing else.
PURE = frozenset([int, float, complex, bool, abs, min, max, round, pow, divmod, range, list, tuple, sum, sorted, slice])
# Libraries whose functions take a number for something that may not show.
PLAIN = ("builtins", "itertools", "collections", "heapq", "bisect", "math", "random", "statistics", "fractions",
         "decimal", "functools", "numpy", "array", "operator")  # fmt: skip
# What these do with a number shows in what they give, or is nobody's business.
OPEN = frozenset([
    "len", "enumerate", "reversed", "iter", "print", "isinstance", "issubclass", "getattr", "setattr", "hasattr",
    "type", "super", "str", "repr", "format", "id", "hash", "any", "all", "dict", "set", "frozenset", "next", "map",
    "callable", "vars", "object", "OrderedDict", "defaultdict", "partial", "append", "extend", "add", "update", "join",
    "property", "Size", "ValueError", "array", "asarray", "arange", "zeros", "ones",
])  # fmt: skip
SEQUENCES = (list, tuple, str, bytes, range)
NUMBERS = (int, float, complex, np.generic)


@dataclass(frozen=True)
class Names:
    """What a source gives names.

    Args:
        assigned: name -> the one expression that it is given.
        imported: name -> the module that it stands for.
    """

    assigned: Mapping[str, ast.expr]
    imported: Mapping[str, str]


class Evaluator:
    """Works out expressions with the values that names have in a frame.

    Args:
        frame: that is running.
        names: what names are given in its source, for those that have no value yet.
    """

    def __init__(self, names: Names, frame: FrameType) -> None:
        self.assigned, self.imported = names.assigned, names.imported
        self.local, self.space = frame.f_locals, frame.f_globals
        self.depth = 0

    def value(self, node: ast.AST | None) -> Made:
        """What an expression comes to; `UNKNOWN` where only running it would tell, or where it fails."""
        if node is None:
            return None
        known = _VALUES.get(type(node))
        if known is None:
            return UNKNOWN
        try:
            return known(self, node)
        except Exception:  # the code itself says so where it runs
            return UNKNOWN

    def reaches(self, guards: Sequence[Guard]) -> bool:
        """Whether nothing is known that keeps the code from getting there."""
        for test, side in guards:
            found = self._truth(test)
            if found is not None and found is not side:
                return False
        return True

    def _truth(self, test: ast.expr) -> bool | None:
        """Whether a test holds; None where only running it would tell."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            found = self._truth(test.operand)
            return None if found is None else not found
        if isinstance(test, ast.BoolOp):
            every = isinstance(test.op, ast.And)
            each = [self._truth(value) for value in test.values]
            if (not every) in each:
                return not every
            return None if None in each else every
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Is, ast.IsNot)) and len(test.ops) == 1:
            one, other = self.value(test.left), self.value(test.comparators[0])
            known = one is not UNKNOWN and other is not UNKNOWN
            return (one is other) == isinstance(test.ops[0], ast.Is) if known else None
        found = self.value(test)
        plain = isinstance(found, (*NUMBERS, *SEQUENCES, dict, set, deque)) or found is None
        return bool(bare(found)) if plain else None

    def _name(self, node: ast.Name) -> Made:
        for space in (self.local, self.space):
            if node.id in space:
                return space[node.id]
        if hasattr(builtins, node.id):
            return getattr(builtins, node.id)
        given = self.assigned.get(node.id)
        if given is None or self.depth >= DEEPEST:
            return sys.modules.get(self.imported.get(node.id, ""), UNKNOWN)
        self.depth += 1
        found = self.value(given)
        self.depth -= 1
        return found

    def _attribute(self, node: ast.Attribute) -> Made:
        return attribute(self.value(node.value), node.attr)

    def _subscript(self, node: ast.Subscript) -> Made:
        base, key = self.value(node.value), self.value(node.slice)
        if key is UNKNOWN or not isinstance(base, (*SEQUENCES, dict, nn.ModuleList)):
            return UNKNOWN
        return base[key]

    def _slice(self, node: ast.Slice) -> Made:
        parts = [self.value(part) for part in (node.lower, node.upper, node.step)]
        return UNKNOWN if any(part is UNKNOWN for part in parts) else slice(*parts)

    def _binary(self, node: ast.BinOp) -> Made:
        left, right = self.value(node.left), self.value(node.right)
        if not (isinstance(left, (*NUMBERS, *SEQUENCES)) and isinstance(right, (*NUMBERS, *SEQUENCES))):
            return UNKNOWN
        if isinstance(node.op, (ast.Pow, ast.LShift)) and abs(right) > 64:  # type: ignore[arg-type]
            return UNKNOWN
        if any(isinstance(part, SEQUENCES) for part in (left, right)):
            times = next((part for part in (left, right) if isinstance(part, int)), 1)
            if times * max(len(part) for part in (left, right) if isinstance(part, SEQUENCES)) > LONGEST:
                return UNKNOWN
        return BINARY[type(node.op)](bare(left), bare(right))

    def _unary(self, node: ast.UnaryOp) -> Made:
        value = self.value(node.operand)
        return UNARY[type(node.op)](bare(value)) if isinstance(value, NUMBERS) else UNKNOWN

    def _compare(self, node: ast.Compare) -> Made:
        values = [bare(self.value(part)) for part in (node.left, *node.comparators)]
        if not all(isinstance(value, (*NUMBERS, str)) for value in values):
            return UNKNOWN
        pairs = zip(node.ops, values, values[1:], strict=False)
        return all(COMPARED[type(op)](a, b) for op, a, b in pairs)

    def _if(self, node: ast.IfExp) -> Made:
        test = self.value(node.test)
        return self.value(node.body if test else node.orelse) if isinstance(test, (*NUMBERS, str)) else UNKNOWN

    def _items(self, node: ast.Tuple | ast.List) -> Made:
        if any(isinstance(part, ast.Starred) for part in node.elts):
            return UNKNOWN
        items = [self.value(part) for part in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items

    def _call(self, node: ast.Call) -> Made:
        if any(isinstance(part, ast.Starred) for part in node.args) or any(k.arg is None for k in node.keywords):
            return UNKNOWN
        given = [self.value(part) for part in node.args]
        if isinstance(node.func, ast.Attribute) and isinstance(tensor := self.value(node.func.value), Tensor):
            return _of_tensor(tensor, node.func.attr, given)
        function = self.value(node.func)
        if function is len and len(given) == 1:
            return len_of(given[0])
        if not is_pure(function) or node.keywords or not all(_is_plain(value) for value in given):
            return UNKNOWN
        if sum(len(value) for value in given if isinstance(value, SEQUENCES)) > LONGEST:
            return UNKNOWN
        return function(*map(bare, given))


_VALUES: dict[type[ast.AST], Callable[[Evaluator, ast.AST], Made]] = {
    ast.Constant: lambda reader, node: node.value,  # type: ignore[attr-defined]
    ast.Name: Evaluator._name,  # type: ignore[dict-item]
    ast.Attribute: Evaluator._attribute,  # type: ignore[dict-item]
    ast.Subscript: Evaluator._subscript,  # type: ignore[dict-item]
    ast.Slice: Evaluator._slice,  # type: ignore[dict-item]
    ast.BinOp: Evaluator._binary,  # type: ignore[dict-item]
    ast.UnaryOp: Evaluator._unary,  # type: ignore[dict-item]
    ast.Compare: Evaluator._compare,  # type: ignore[dict-item]
    ast.IfExp: Evaluator._if,  # type: ignore[dict-item]
    ast.Tuple: Evaluator._items,  # type: ignore[dict-item]
    ast.List: Evaluator._items,  # type: ignore[dict-item]
    ast.Call: Evaluator._call,  # type: ignore[dict-item]
}


def bare(value: Made) -> Made:
    """A number that remembers something as one that does not."""
    if type(value) in (int, float, bool) or not isinstance(value, (int, float)):
        return value.item() if isinstance(value, np.generic) else value
    return int.__int__(value) if isinstance(value, int) else float.__float__(value)


def attribute(base: Made, name: str) -> Made:
    """What stands under a name of an object; no code of the object's own is run to find it."""
    if isinstance(base, Tensor):
        return _of_tensor(base, name, []) if name in ("shape", "ndim") else UNKNOWN
    if isinstance(base, NUMBERS):
        return f"{name} of {bare(base)}"  # a method that is bound to the number
    if base is UNKNOWN or isinstance(base, SEQUENCES):
        return UNKNOWN
    if isinstance(base, (nn.Module, ModuleType)) or hasattr(base, "__dict__"):
        stores: list[Mapping[str, object]] = [vars(base)]
        stores += [getattr(base, kind) for kind in ("_modules", "_buffers", "_parameters")] if _is_module(base) else []
        for store in stores:
            if name in store:
                return store[name]
        for kind in type(base).__mro__ if not isinstance(base, ModuleType) else ():
            if isinstance(vars(kind).get(name), (int, float, str)):
                return vars(kind)[name]
    return UNKNOWN


def _is_module(base: object) -> bool:
    return isinstance(base, nn.Module)


def _of_tensor(tensor: Tensor, name: str, given: Sequence[Made]) -> Made:
    """Sizes of a tensor, which no mode is asked for."""
    if name not in ("shape", "size", "ndim", "dim", "numel", "nelement"):
        return UNKNOWN
    with torch._C.DisableTorchFunction():
        sizes = tuple(tensor.shape)
    if name in ("shape", "size"):
        return sizes[given[0]] if given else sizes
    return len(sizes) if name in ("ndim", "dim") else math.prod(sizes)


def len_of(value: Made) -> Made:
    """How many entries something has."""
    if isinstance(value, Tensor):
        return _of_tensor(value, "size", [0])
    if isinstance(value, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return len(value._modules)
    return len(value) if isinstance(value, (*SEQUENCES, dict, set, deque)) else UNKNOWN


def is_pure(function: Made) -> bool:
    """Whether a function gives what its arguments say, and does nothing else."""
    if isinstance(function, np.ufunc):
        return True
    if getattr(function, "__module__", None) in ("math", "_operator", "operator"):
        return True
    try:
        return function in PURE
    except TypeError:  # what cannot be hashed
        return False


def is_of_library(function: Made) -> bool:
    """Whether a function is one of a library that holds no models, and may take a number for what does not show."""
    home = getattr(function, "__module__", None)
    return is_pure(function) or (isinstance(home, str) and home.split(".")[0].lstrip("_") in PLAIN)


def _is_plain(value: Made) -> bool:
    if isinstance(value, (*NUMBERS, str, bytes, range, slice)) or value is None:
        return True
    return isinstance(value, (list, tuple)) and len(value) <= LONGEST and all(_is_plain(item) for item in value)


# -- what is worth working out ---------------------------------------------------------------------------------------

TESTS = (ast.If, ast.While, ast.IfExp, ast.Assert, ast.comprehension)
# Code of its own: functions, and comprehensions, which Python compiles into the function around them from 3.12 on.
SCOPES: dict[str, type[ast.AST]] = {"<lambda>": ast.Lambda, "<genexpr>": ast.GeneratorExp}
if sys.version_info < (3, 12):
    SCOPES.update({"<listcomp>": ast.ListComp, "<setcomp>": ast.SetComp, "<dictcomp>": ast.DictComp})


def absorbing(source: SourcePart, code: CodeType, inside: Position) -> Iterator[ast.expr]:
    """Expressions of a piece of code that may come to the same though a number in them is another.

    Arithmetic, comparisons that are no test of the code's (those are decisions, which are watched), bounds of slices,
    and calls.
    """
    kind = SCOPES.get(code.co_name, ast.FunctionDef)
    for position, node in source.at.items():
        if not (is_inside(position, inside) and isinstance(node, (ast.BinOp, ast.Compare, ast.Call, ast.Subscript))):
            continue
        if _may_absorb(source, node) and _scope(source, node) is kind:
            yield node


def _may_absorb(source: SourcePart, node: ast.BinOp | ast.Compare | ast.Call | ast.Subscript) -> bool:
    if isinstance(node, ast.BinOp):
        return type(node.op) in BINARY
    if isinstance(node, ast.Compare):
        return all(type(op) in COMPARED for op in node.ops) and not _is_test(source, node)
    if isinstance(node, ast.Call):
        return not all(isinstance(part, ast.Constant) for part in (*node.args, *(k.value for k in node.keywords)))
    return isinstance(node.slice, ast.Slice)


def _is_test(source: SourcePart, node: ast.AST) -> bool:
    for _, parent, role in source.climb(node):
        if isinstance(parent, TESTS):
            return role in ("test", "ifs")
        if not isinstance(parent, (ast.BoolOp, ast.UnaryOp, ast.Compare)):
            return isinstance(parent, ast.Raise)
    return False


def _scope(source: SourcePart, node: ast.AST) -> type[ast.AST]:
    """In which kind of code an expression runs."""
    outside = False  # what a comprehension goes through first is worked out around it
    for _, parent, role in source.climb(node):
        if isinstance(parent, ast.comprehension):
            around = source.parents[parent][0]
            outside = role == "iter" and getattr(around, "generators")[0] is parent  # noqa: B009
        elif type(parent) in SCOPES.values() and not outside:
            return type(parent)
        elif isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            break
        elif isinstance(parent, COMPREHENSIONS):
            outside = False
    return ast.FunctionDef


Guard = tuple[ast.expr, bool]  # a test, and whether it has to hold


def guards_of(source: SourcePart, node: ast.AST) -> tuple[Guard, ...]:
    """What has to hold for an expression to be reached once its line runs: several sides may stand in one line."""
    found: list[Guard] = []
    for inner, parent, role in source.climb(node):
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            break
        if isinstance(parent, ast.IfExp) and role in ("body", "orelse"):
            found.append((parent.test, role == "body"))
        elif isinstance(parent, ast.BoolOp) and inner in parent.values:
            before = parent.values[: parent.values.index(inner)]
            found += [(value, isinstance(parent.op, ast.And)) for value in before]
        elif isinstance(parent, (ast.If, ast.While)) and role == "body" and parent.lineno == _line_of(inner):
            found.append((parent.test, True))
    return tuple(found)


def _line_of(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def names_in(source: SourcePart) -> Names:
    """What the names of a source are given, by plain assignments of one expression and by imports of modules."""
    found: dict[str, ast.expr] = {}
    modules: dict[str, str] = {}
    often: set[str] = set()
    for node in source.at.values():
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            parent = source.parents.get(node, (None, ""))[0]
            plain = isinstance(parent, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and parent.value is not None
            if not plain or node.id in found:
                often.add(node.id)
            else:
                found[node.id] = parent.value  # type: ignore[union-attr]
        elif isinstance(node, ast.Import):
            modules.update({each.asname or each.name: each.name for each in node.names})
    return Names({name: node for name, node in found.items() if name not in often}, modules)
