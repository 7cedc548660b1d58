"""Which lines of a code decide by a value that it was given: read from its source, as plain values tell nothing.

Flags, words, fractions and None cannot be watched while a forward runs. Their names can: a test that mentions one of
them, or a name that was made of it, is where another value would take another path.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import nn

from secateur.model.place import short
from secateur.structure.read import kept, nodes_of, tree_of

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
        "items",
        "values",
        "pop",
        "setdefault",
    )
)  # fmt: skip - hand on what they are given as a plain value
FORMS = ("isinstance", "issubclass", "type", "id", "hasattr", "callable", "is_tensor")  # what a thing is, not its value
LOOK_UPS = ("get", "pop", "setdefault")
DEPTH = 4  # of functions and modules that an argument is handed on to
Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda"


def deciding_lines(model: nn.Module, name: str, *, form: bool = False) -> list[str]:
    """Lines that decide by an argument of a model's forward, "file:line", in the forward and where it is handed on to.

    Args:
        model: whose forward is read.
        name: of the argument.
        form: only lines that ask what it is (its type, or whether it is another object or None), and not what is in it:
            those of a tensor, whose values and sizes are watched while the model runs.
    """
    found: dict[str, None] = {}
    for where in _lines(plain_function(model.forward), model, name, DEPTH, form):
        found.setdefault(where)
    return list(found)


@kept
def reading_lines(filename: str, line: int, name: str) -> tuple[str, ...]:
    """Lines that decide by what is asked for at a line, there or by a name that it was given.

    Args:
        filename: of the code.
        line: where the question stands.
        name: "len", or the attribute or method of a tensor that was asked for.
    """
    tree = tree_of(filename)
    inside = [f for f in nodes_of(tree) if isinstance(f, ast.FunctionDef) and f.lineno <= line <= (f.end_lineno or 0)]
    scope: ast.AST = max(inside, key=lambda f: f.lineno, default=tree)
    asked = {node for node in nodes_of(scope) if _is_reading(node, line, name)}
    names: set[str] = set()
    for node in nodes_of(scope):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and holds_any(node.value, asked):
            names.update(targets(node))
    names = made_of(scope, names)
    # `torch.arange(n, device=x.device)` in a test asks for a place to put something, and decides nothing by it.
    put = {part for node in nodes_of(scope) if _is_option(node) for part in ast.walk(node)}
    tests = (t for t in tests_in(scope) if any(_is_answer(p, asked, names) for p in ast.walk(t) if p not in put))
    lines = [test.lineno for test in tests]
    if name != "len":
        lines += [value.lineno for value in handed_back(scope) if _as_it_is(value) in asked]
    return tuple(dict.fromkeys(f"{short(filename)}:{line}" for line in lines))


def handed_back(scope: ast.AST) -> Iterator[ast.expr]:
    """What functions give their callers to decide by."""
    for node in nodes_of(scope):
        if isinstance(node, ast.Lambda):
            yield node.body
        elif isinstance(node, ast.Return) and node.value is not None:
            yield node.value


def _is_reading(node: ast.AST, line: int, name: str) -> bool:
    if not isinstance(node, (ast.Call, ast.Attribute)) or not node.lineno <= line <= (node.end_lineno or 0):
        return False
    if isinstance(node, ast.Attribute):
        return node.attr == name
    return isinstance(node.func, ast.Name) and node.func.id == name


def _is_option(node: ast.AST) -> bool:
    return isinstance(node, ast.keyword) and node.arg in ("device", "dtype", "layout")


def _is_answer(node: ast.AST, asked: set[ast.AST], names: set[str]) -> bool:
    return node in asked or (isinstance(node, ast.Name) and node.id in names)


def _as_it_is(node: ast.expr | None) -> ast.AST | None:
    """What a function hands back for its caller to decide by: the answer itself, or the opposite."""
    node = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else node
    return node.func if isinstance(node, ast.Call) else node


def holds_any(node: ast.AST | None, parts: set[ast.AST]) -> bool:
    """Whether one of these parts stands in an expression."""
    return node is not None and bool(parts) and any(part in parts for part in ast.walk(node))


def plain_function(function: Any) -> FunctionType | None:
    """The function behind decorators and bound methods; None where there is none of Python."""
    function = inspect.unwrap(function)
    function = function.__func__ if isinstance(function, MethodType) else function
    return function if isinstance(function, FunctionType) else None


def _lines(function: FunctionType | None, owner: nn.Module, name: str, depth: int, form: bool = False) -> Iterator[str]:
    node = definition(function.__code__) if function is not None and depth > 0 else None
    if function is None or node is None or function.__code__.co_filename.startswith(TORCH):
        return
    here, calls = _uses(node, function.__code__.co_filename, name, form)
    yield from here
    for call, given in calls:
        for callee, other in callees(call, function, owner, node):
            for position, keyword in given:
                for handed in _handed(callee, position, keyword, call):
                    yield from _lines(callee, other, handed, depth - 1, form)


Given: TypeAlias = "tuple[tuple[int, str | None], ...]"  # place among the arguments, or -1 and the keyword


@kept
def _uses(
    node: Function, filename: str, name: str, form: bool
) -> tuple[tuple[str, ...], tuple[tuple[ast.Call, Given], ...]]:
    """Lines of a function that decide by an argument, and calls that it is handed on to."""
    names = _other_names(node, {name}) if form else made_of(node, {name})
    tests = _tests_of_form(node, names) if form else (test for test in tests_in(node) if mentions(test, names))
    lines = tuple(f"{short(filename)}:{test.lineno}" for test in tests)
    calls = []
    for call in (part for part in nodes_of(node) if isinstance(part, ast.Call)):
        given: list[tuple[int, str | None]] = [
            (i, None) for i, a in enumerate(call.args) if isinstance(a, ast.Name) and a.id in names
        ]
        given += [(-1, k.arg) for k in call.keywords if isinstance(k.value, ast.Name) and k.value.id in names]
        if given:
            calls.append((call, tuple(given)))
    return lines, tuple(calls)


def _handed(function: FunctionType | None, position: int, keyword: str | None, call: ast.Call) -> Iterator[str]:
    """Names under which a function gets an argument; keywords that are handed on whole may be any of its options."""
    if function is None or keyword is not None or position >= 0:
        yield from filter(None, [keyword or _parameter(function, position)])
        return
    said = {k.arg for k in call.keywords}
    for number, one in enumerate(inspect.signature(function).parameters.values()):
        option = one.default is not one.empty and number > len(call.args) and one.name not in said
        if one.kind is one.VAR_KEYWORD or option:
            yield one.name


def definition(code: CodeType) -> Function | None:
    """The definition of a function in its file."""
    # By where it stands: code is equal to code of other files that says the same in the same line.
    return _definition(code.co_filename, code.co_firstlineno, code.co_name, _column(code))


def _column(code: CodeType) -> int:
    """Where in its line a lambda has its body; several may stand in one line."""
    if code.co_name != "<lambda>":
        return 0
    places = [p for p in code.co_positions() if p[0] == code.co_firstlineno]
    return min((p[2] for p in places if p[2] is not None and p[3] is not None and p[3] > p[2]), default=-1)


@kept
def _definition(filename: str, line: int, name: str, column: int) -> Function | None:
    if name == "<lambda>":
        found = [n for n in nodes_of(tree_of(filename)) if isinstance(n, ast.Lambda) and n.lineno == line]
        here = [n for n in found if n.body.lineno > line or n.body.col_offset <= column]
        return max(here, key=lambda n: n.col_offset, default=None) if len(found) > 1 else next(iter(found), None)
    for node in nodes_of(tree_of(filename)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            if first == line and node.name == name:
                return node
    return None


def callees(
    call: ast.Call, function: FunctionType, owner: nn.Module, node: ast.AST
) -> Iterator[tuple[FunctionType | None, nn.Module]]:
    """What a call may run: a method, a module, each module of a list that a loop goes through, a function."""
    of = call.func.value if isinstance(call.func, ast.Attribute) else None
    if isinstance(call.func, ast.Attribute) and isinstance(of, ast.Name) and of.id in receivers(function):
        yield from _run_by(held_as(owner, call.func.attr), owner)
    elif isinstance(call.func, ast.Attribute) and _is_super(call.func.value):
        yield from _run_by(_inherited(owner, function, call.func.attr), owner)
    elif isinstance(call.func, ast.Name):
        for loop in (part for part in nodes_of(node) if isinstance(part, ast.For)):
            if call.func.id in {part.id for part in ast.walk(loop.target) if isinstance(part, ast.Name)}:
                for part in ast.walk(loop.iter):
                    held = held_as(owner, part.attr) if isinstance(part, ast.Attribute) else None
                    for module in {type(m): m for m in held}.values() if isinstance(held, nn.ModuleList) else ():
                        yield from _run_by(module, owner)
        yield from _run_by(held_by(function, call.func.id), owner)


def receivers(function: FunctionType) -> tuple[str, ...]:
    """What a method may call its module: `self` by custom, its first argument in truth."""
    code = function.__code__
    return ("self", *code.co_varnames[: min(1, code.co_argcount)])


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _inherited(owner: nn.Module, function: FunctionType, name: str) -> object:
    """What `super()` finds in a method: in the classes behind the one that the method stands in."""
    order = type(owner).__mro__
    here = [i for i, kind in enumerate(order) if any(plain_function(v) is function for v in vars(kind).values())]
    behind = order[here[0] + 1 :] if here else ()
    return next((vars(kind)[name] for kind in behind if name in vars(kind)), None)


def held_by(function: FunctionType, name: str, missing: object = None) -> object:
    """What a name that is no local one stands for: in a closure, or in the module of a function."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        return cells[name].cell_contents if name in cells else function.__globals__.get(name, missing)
    except ValueError:  # not filled yet
        return missing


def _run_by(value: object, owner: nn.Module) -> Iterator[tuple[FunctionType | None, nn.Module]]:
    if isinstance(value, nn.Module):
        yield plain_function(value.forward), value
    elif isinstance(value, (MethodType, FunctionType, staticmethod, classmethod)):
        yield plain_function(value), owner


def held_as(owner: nn.Module, name: str) -> object:
    """What a module or its class has under a name; a property is not asked, as that would run code of the user's."""
    spaces = (vars(owner), owner._modules)
    found = next((space[name] for space in spaces if name in space), None)
    return inspect.getattr_static(type(owner), name, None) if found is None else found


def _parameter(function: FunctionType | None, position: int) -> str:
    """Name of the parameter that a positional argument is given to; methods are called without their first."""
    if function is None:
        return ""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    position += bool(names) and names[0] == "self"
    return names[position] if position < len(names) else ""


# -- expressions -----------------------------------------------------------------------------------------------------


def tests_in(scope: ast.AST) -> Iterator[ast.expr]:
    """Expressions that decide: tests, comparisons, keys and names that something is looked up by."""
    for node in nodes_of(scope):
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
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOK_UPS:
            yield from node.args[:1]


def _tests_of_form(scope: ast.AST, names: set[str]) -> Iterator[ast.expr]:
    """Expressions that decide by what these names are: their types, and whether one of them is another, or None."""
    asked = {node for node in nodes_of(scope) if _asks_form(node, names)}
    flags: set[str] = set()
    for node in nodes_of(scope):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and holds_any(node.value, asked):
            flags.update(targets(node))
    # A name that is chosen by such a question is no answer to it: `xs = xs if isinstance(xs, list) else [xs]`.
    flags = made_of(scope, flags - names)
    for test in tests_in(scope):
        if holds_any(test, asked) or mentions(test, flags):
            yield test


def _asks_form(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Call) and node.args:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return function in FORMS and isinstance(node.args[0], ast.Name) and node.args[0].id in names
    if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return any(isinstance(part, ast.Name) and part.id in names for part in (node.left, *node.comparators))
    return isinstance(node, ast.Attribute) and node.attr == "__class__" and mentions(node.value, names)


def _other_names(scope: ast.AST, names: set[str]) -> set[str]:
    """These names, and those that were given the same object."""
    known: set[str] = set()
    names = set(names)
    while names != known:
        known = set(names)
        for node in nodes_of(scope):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                parts = [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
                if any(isinstance(part, ast.Name) and part.id in names for part in parts):
                    names.update(targets(node))
    return names


def mentions(node: ast.AST, names: set[str]) -> bool:
    """Whether one of these names stands in an expression."""
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def targets(node: ast.Assign | ast.AnnAssign | ast.NamedExpr) -> Iterator[str]:
    """Names that an assignment gives a value to."""
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        for part in ast.walk(target):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def made_of(scope: ast.AST, names: set[str]) -> set[str]:
    """These names, and those of plain values that were made of them: what a layer makes of a value is a tensor."""
    known: set[str] = set()
    names = set(names)
    while names != known:
        known = set(names)
        for node in nodes_of(scope):
            if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) or node.value is None:
                continue
            if mentions(node.value, names) and _is_plain(node.value):
                names.update(targets(node))
    return names


def _is_plain(node: ast.AST) -> bool:
    calls: list[Callable[..., object] | ast.AST] = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return all(
        (f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else "") in PLAIN_CALLS
        for f in calls
    )
