"""What the code asks of its surroundings: the environment, modes of torch, globals; read from the source.

A plan is learned in one process, in one mode. A model that asks whether autocast is on, what a variable of the
environment says or whether a global flag is set takes another path elsewhere, and no value of a tensor tells of it.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from itertools import chain
from types import FunctionType, ModuleType

from torch import Tensor, nn

from secateur.model.place import short
from secateur.structure.asked import definition, handed_back, held_by, made_of, mentions, targets, tests_in
from secateur.structure.conditions import Branch
from secateur.structure.read import kept, nodes_of
from secateur.structure.switches import Forwards
from secateur.types import Condition

MOST_LINES = 6  # that are said; how many more there are stands in the last of them
OUTSIDE = ("logging", "os", "platform", "socket", "sys", "time")  # modules that are nothing but surroundings
FLAGS = (bool, str, type(None))


def surroundings(own: Forwards) -> Iterator[Branch]:
    """One condition for each line of a model's code that decides by something around it.

    Args:
        own: what `forwards` says of the model.
    """
    found: dict[str, tuple[str, str]] = {}
    for path, (_, functions) in own.items():
        for function in functions:
            for line, words in _lines(function):
                where = f"{short(function.__code__.co_filename)}:{line}"
                text = f"holds for {words} as it was here, which is asked of the surroundings and decides"
                found.setdefault(where, (text, path))
    more = len(found) - MOST_LINES
    for number, (where, (text, path)) in enumerate(list(found.items())[:MOST_LINES]):
        last = f"; {more} more such lines are left out" if more > 0 and number == MOST_LINES - 1 else ""
        yield Branch("around", Condition(text + last, where, path), text)


def _lines(function: FunctionType) -> Iterator[tuple[int, str]]:
    """Lines of a function that decide by something around it, and what that is."""
    node = definition(function.__code__)
    if node is None:
        return
    named: dict[str, str] = {}
    for part in nodes_of(node):
        if isinstance(part, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and part.value is not None:
            words = next(_asked(part.value, function), "")
            if words:
                named.update(dict.fromkeys(made_of(node, set(targets(part))), words))
    for test in _deciding(node):
        asked = chain(_asked(test, function), (said for name, said in named.items() if mentions(test, {name})))
        words = next(asked, "")
        if words:
            yield test.lineno, words


@kept
def _deciding(node: ast.AST) -> tuple[ast.expr, ...]:
    """Tests, and what a method hands back for its caller to decide by."""
    bare = (value.operand if isinstance(value, ast.UnaryOp) else value for value in handed_back(node))
    plain = (ast.Call, ast.Attribute, ast.Name, ast.Subscript)
    return (*tests_in(node), *(value for value in bare if isinstance(value, plain)))


def _asked(node: ast.AST, function: FunctionType) -> Iterator[str]:
    """What an expression asks of the surroundings, as it stands in the source; larger parts come first."""
    for part in _asking(node):
        if _is_around(part, function):
            yield ast.unparse(part)


@kept
def _asking(node: ast.AST) -> tuple[ast.expr, ...]:
    """Parts of an expression that may ask; what the names in them stand for changes, the source does not."""
    return tuple(p for p in ast.walk(node) if isinstance(p, (ast.Call, ast.Attribute, ast.Subscript, ast.Name)))


def _is_around(node: ast.expr, function: FunctionType) -> bool:
    if isinstance(node, ast.Call):
        plain = all(isinstance(each, ast.Constant) for each in (*node.args, *(k.value for k in node.keywords)))
        asked = _is_question(_held(node.func, function)) or _is_of_object(node.func, function)
        return (plain and asked) or _is_outside(node.func, function)
    if isinstance(node, ast.Subscript):
        return isinstance(_held(node.value, function), dict) or _is_outside(node.value, function)
    value = _held(node, function)
    return _is_outside(node, function) or (value is not MISSING and _is_flag(value))


MISSING = object()


def _held(node: ast.AST, function: FunctionType) -> object:
    """What a global name, or a chain of attributes behind one, stands for; nothing of it is run."""
    if isinstance(node, ast.Attribute):
        owner = _held(node.value, function)
        spaces = (vars(each) for each in (owner, *getattr(type(owner), "__mro__", ())) if hasattr(each, "__dict__"))
        return next((space[node.attr] for space in spaces if node.attr in space), MISSING)
    if not isinstance(node, ast.Name) or node.id in function.__code__.co_varnames:
        return MISSING
    return held_by(function, node.id, MISSING)


def _is_question(value: object) -> bool:
    """A function that is asked without any argument of the model: what it answers lies around it."""
    if isinstance(value, (Tensor, nn.Module, type)) or value is MISSING or not callable(value):
        return False
    name = getattr(value, "__name__", "")
    mine = isinstance(value, FunctionType) and not (value.__module__ or "").startswith("torch")
    return (mine or name.startswith(("is_", "_is_", "are_", "get_", "has_"))) and name not in vars(builtins)


def _is_of_object(node: ast.expr, function: FunctionType) -> bool:
    """Whether this is a method of an object that lies around the model: a logger, a table, a variable of a context."""
    owner = _held(node.value, function) if isinstance(node, ast.Attribute) else MISSING
    return owner is not MISSING and not isinstance(owner, (ModuleType, type, Tensor, nn.Module, str))


def _is_flag(value: object) -> bool:
    return type(value) in FLAGS or (type(value) is int and value in (0, 1))


def _is_outside(node: ast.AST, function: FunctionType) -> bool:
    """Whether a chain of names begins at a module such as `os`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
        held = _held(node, function)
        if isinstance(held, ModuleType) and (held.__name__ in OUTSIDE or held.__name__.startswith("torch.backends")):
            return True
    return False
