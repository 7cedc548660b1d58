"""Which lines of a code decide by a value that it was given: read from its source, as plain values tell nothing.

Flags, words, fractions and None cannot be watched while a forward runs. Their names can: a test that mentions one of
them, or a name that was made of it, is where another value would take another path.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import nn

from secateur.model.place import short

TORCH = str(Path(torch.__file__).parent)
PLAIN_CALLS = frozenset(
    (
        "len",
        "int",
        "float",
        "bool",
        "str",
        "min",
        "max",
        "abs",
        "any",
        "all",
        "isinstance",
        "getattr",
        "hasattr",
        "get",
        "lower",
        "upper",
        "strip",
        "startswith",
        "endswith",
        "keys",
    )
)  # fmt: skip - hand on what they are given as a plain value
DEPTH = 4  # of functions and modules that an argument is handed on to
Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda"


@cache
def tree_of(filename: str) -> ast.Module:
    """The parsed file; an empty one where there is no source."""
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def deciding_lines(model: nn.Module, name: str) -> list[str]:
    """Lines that decide by an argument of a model's forward, "file:line", in the forward and where it is handed on to.

    Args:
        model: whose forward is read.
        name: of the argument.
    """
    found: dict[str, None] = {}
    for where in _lines(_plain(model.forward), model, name, DEPTH):
        found.setdefault(where)
    return list(found)


@cache
def length_lines(filename: str, line: int) -> tuple[str, ...]:
    """Lines that decide by a `len(...)` which is asked for at a line, there or by a name that it was given."""
    tree = tree_of(filename)
    inside = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.lineno <= line <= (f.end_lineno or 0)]
    scope: ast.AST = max(inside, key=lambda f: f.lineno, default=tree)
    calls: set[ast.AST] = {node for node in ast.walk(scope) if isinstance(node, ast.Call) and _is_length(node, line)}
    names: set[str] = set()
    for node in ast.walk(scope):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and _holds(node.value, calls):
            names.update(_targets(node))
    names = _made_of(scope, names)
    tests = (test for test in _tests(scope) if _holds(test, calls) or _mentions(test, names))
    return tuple(dict.fromkeys(f"{short(filename)}:{test.lineno}" for test in tests))


def _is_length(node: ast.Call, line: int) -> bool:
    here = node.lineno <= line <= (node.end_lineno or 0)
    return here and isinstance(node.func, ast.Name) and node.func.id == "len"


def _holds(node: ast.AST | None, parts: set[ast.AST]) -> bool:
    return node is not None and bool(parts) and any(part in parts for part in ast.walk(node))


def _plain(function: Any) -> FunctionType | None:
    function = inspect.unwrap(function)
    function = function.__func__ if isinstance(function, MethodType) else function
    return function if isinstance(function, FunctionType) else None


def _lines(function: FunctionType | None, owner: nn.Module, name: str, depth: int) -> Iterator[str]:
    if function is None or depth == 0 or function.__code__.co_filename.startswith(TORCH):
        return
    node = _source(function.__code__)
    if node is None:
        return
    names = _made_of(node, {name})
    for test in _tests(node):
        if _mentions(test, names):
            yield f"{short(function.__code__.co_filename)}:{test.lineno}"
    for call in (part for part in ast.walk(node) if isinstance(part, ast.Call)):
        given: list[tuple[int, str | None]] = [
            (i, None) for i, a in enumerate(call.args) if isinstance(a, ast.Name) and a.id in names
        ]
        given += [(-1, k.arg) for k in call.keywords if isinstance(k.value, ast.Name) and k.value.id in names]
        for callee, other in _callees(call, function, owner, node) if given else ():
            for position, keyword in given:
                handed = keyword or _parameter(callee, position)
                if handed:
                    yield from _lines(callee, other, handed, depth - 1)


def _source(code: CodeType) -> Function | None:
    """The definition of a function in its file."""
    for node in ast.walk(tree_of(code.co_filename)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            if first == code.co_firstlineno and node.name == code.co_name:
                return node
    return None


def _callees(
    call: ast.Call, function: FunctionType, owner: nn.Module, node: ast.AST
) -> Iterator[tuple[FunctionType | None, nn.Module]]:
    """What a call may run: a method, a module, each module of a list that a loop goes through, a function."""
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == "self":
        yield from _run_by(getattr(owner, call.func.attr, None), owner)
    elif isinstance(call.func, ast.Name):
        for loop in (part for part in ast.walk(node) if isinstance(part, ast.For)):
            if call.func.id in {part.id for part in ast.walk(loop.target) if isinstance(part, ast.Name)}:
                for part in ast.walk(loop.iter):
                    held = getattr(owner, part.attr, None) if isinstance(part, ast.Attribute) else None
                    for module in {type(m): m for m in held}.values() if isinstance(held, nn.ModuleList) else ():
                        yield from _run_by(module, owner)
        yield from _run_by(function.__globals__.get(call.func.id), owner)


def _run_by(value: Any, owner: nn.Module) -> Iterator[tuple[FunctionType | None, nn.Module]]:
    if isinstance(value, nn.Module):
        yield _plain(value.forward), value
    elif isinstance(value, (MethodType, FunctionType)):
        yield _plain(value), owner


def _parameter(function: FunctionType | None, position: int) -> str:
    """Name of the parameter that a positional argument is given to; methods are called without their first."""
    if function is None:
        return ""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    position += bool(names) and names[0] == "self"
    return names[position] if position < len(names) else ""


# -- expressions -----------------------------------------------------------------------------------------------------


def _tests(scope: ast.AST) -> Iterator[ast.expr]:
    """Expressions that decide: tests, comparisons, keys and names that something is looked up by."""
    for node in ast.walk(scope):
        if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Match):
            yield node.subject
        elif isinstance(node, (ast.Compare, ast.BoolOp)):
            yield node
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            yield from node.args[1:2]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            yield from node.args[:1]


def _mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _targets(node: ast.Assign | ast.AnnAssign | ast.NamedExpr) -> Iterator[str]:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        for part in ast.walk(target):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def _made_of(scope: ast.AST, names: set[str]) -> set[str]:
    """These names, and those of plain values that were made of them: what a layer makes of a value is a tensor."""
    known: set[str] = set()
    names = set(names)
    while names != known:
        known = set(names)
        for node in ast.walk(scope):
            if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) or node.value is None:
                continue
            if _mentions(node.value, names) and _is_plain(node.value):
                names.update(_targets(node))
    return names


def _is_plain(node: ast.AST) -> bool:
    calls: list[Callable[..., Any] | ast.AST] = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return all(
        (f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else "") in PLAIN_CALLS
        for f in calls
    )
