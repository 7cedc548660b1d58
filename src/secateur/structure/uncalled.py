"""What code that ran had at hand and no run called: functions that it handed on or put into lists, and modules.

How often `reduce` or `map` calls a function, how far a slice of a list of them goes, whether `[f] * n` holds any: those
are numbers that another input changes, and no jump of the user's code tells of them. A function that nobody called is
where such a number was nought on the example.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterator, Mapping
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType

import torch
from torch import nn

from secateur.structure.asked import definition, plain_function
from secateur.structure.conditions import listed
from secateur.structure.ran import Ran, Ways, is_watched
from secateur.structure.sides import layout_of, position_of_step
from secateur.structure.source import SourcePart, fails, is_idle
from secateur.types import Condition

LONGEST = 60  # letters of an expression
NAMES = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR")
MAKES = "LOAD_CONST"  # puts the code of a function that is defined here on the stack
# Calls that ask what a function is, or keep it for the backward pass.
ASKS = ("isinstance", "issubclass", "callable", "hasattr", "id", "type")
KEEPS = "register_"
COLLECTIONS = (list, tuple, dict)
# Modules of torch that do nothing to units, or nothing that depends on their number, or hold others.
HARMLESS = ("dropout", "loss", "container", "pooling", "padding", "upsampling", "linear")


def uncalled(piece: Ran, ways: Ways, modules: Mapping[str, nn.Module]) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Functions that code which ran names without calling them, and that no run has called, with their words.

    Args:
        piece: of code that ran.
        ways: all that ran.
        modules: by qualified name, to find the methods of the one that ran the piece.
    """
    layout = layout_of(piece.code)
    source = layout.source
    if source is None:
        return
    ran = {id(each.code) for each in ways.pieces}
    found: dict[int, tuple[ast.expr | ast.FunctionDef, str]] = {}
    for step in layout.steps:
        position = position_of_step(step) if step.opname in (MAKES, *NAMES) else None
        if position is None:
            continue
        text = "holds where `{}` is not called, as on the example; what it does was not seen"
        if step.opname == MAKES:
            node = source.node(position) if _is_left(step.argval, ran) else None
        else:
            node = source.at.get(position)
            value = _held(node, piece, modules)
            if isinstance(value, COLLECTIONS):
                text = "holds where what was not called of `{}` is not called, as on the example"
                unseen = _is_gone_through(value, source, node) and any(
                    _is_held_back(v, ran, ways) for v in _items(value)
                )
            else:
                unseen = value is not None and _is_unseen(value, source, node, ran, ways.called)
            node = node if unseen else None
        if isinstance(node, (ast.expr, ast.FunctionDef)) and not _is_asked(node, source):
            found[step.offset] = node, text
    places = layout.executed(piece) if found else ()
    for place, (node, text) in found.items():
        if place in places:
            yield node, text.format(_words(node))


def _is_left(code: object, ran: Collection[int]) -> bool:
    """Whether this is the code of a function that is made here and never ran; comprehensions run where they stand."""
    if not isinstance(code, CodeType) or id(code) in ran or not code.co_flags & inspect.CO_OPTIMIZED:
        return False
    named = code.co_name == "<lambda>" or not code.co_name.startswith("<")
    return named and is_watched(code.co_filename) and not _does_nothing(code)


def _is_unseen(
    value: object, source: SourcePart, node: ast.AST | None, ran: Collection[int], called: Collection[str]
) -> bool:
    """Whether nothing has called what is named here, and whether it is named to be called by somebody else."""
    parent, name = source.parents.get(node, (None, ""))  # type: ignore[arg-type]
    now = isinstance(parent, ast.Call) and name == "func"
    if isinstance(value, type):  # a module that is made here is called elsewhere
        forward = plain_function(getattr(value, "forward", None)) if issubclass(value, nn.Module) else None
        return (
            now and forward is not None and is_watched(forward.__code__.co_filename) and id(forward.__code__) not in ran
        )
    if now or isinstance(parent, ast.Attribute):
        return False
    if isinstance(value, FunctionType) and is_watched(value.__code__.co_filename):
        return id(value.__code__) not in ran and not _does_nothing(value.__code__)
    return _is_operator(value) and getattr(value, "__name__", "").strip("_") not in called


def _is_gone_through(value: Collection[object], source: SourcePart, node: ast.AST | None) -> bool:
    """Whether a collection is handed on, sliced, counted through or walked; a table that is asked by a key is not."""
    parent, name = source.parents.get(node, (None, ""))  # type: ignore[arg-type]
    if isinstance(parent, ast.Attribute):
        return isinstance(value, dict) and parent.attr in ("values", "items")
    if isinstance(parent, ast.Subscript) and name == "value":
        return not isinstance(value, dict) and not isinstance(parent.slice, (ast.Constant, ast.Attribute))
    return not isinstance(value, dict) and getattr(getattr(parent, "func", None), "id", "") != "len"


def _held(node: ast.AST | None, piece: Ran, modules: Mapping[str, nn.Module]) -> object:
    """What a global name, an attribute of a global one, or a method or collection of the class of `self` stands for."""
    if isinstance(node, ast.Name):
        return piece.space.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    if isinstance(node.value, ast.Name) and piece.code.co_argcount and node.value.id == piece.code.co_varnames[0]:
        runs = type(modules.get(piece.module))
        method = next((vars(k)[node.attr] for k in runs.__mro__ if node.attr in vars(k)), None)
        return method if isinstance(method, (FunctionType, *COLLECTIONS)) else None
    owner = _held(node.value, piece, modules)
    return vars(owner).get(node.attr) if isinstance(owner, ModuleType) else None


@cache
def _operators() -> frozenset[int]:
    """Ids of the functions of torch that take tensors."""
    return frozenset(id(each) for found in torch.overrides.get_overridable_functions().values() for each in found)


def _is_operator(value: object) -> bool:
    return callable(value) and not isinstance(value, (type, MethodType)) and id(value) in _operators()


def _does_nothing(code: CodeType) -> bool:
    """Whether a function hands on what it is given, or a constant, or fails."""
    node = definition(code)
    if isinstance(node, ast.Lambda):
        return isinstance(node.body, (ast.Name, ast.Constant))
    if node is None or is_idle(node.body) or fails(node.body):
        return node is not None
    last = node.body[-1]
    return (
        is_idle(node.body[:-1])
        and isinstance(last, ast.Return)
        and isinstance(last.value, (ast.Name, ast.Constant, type(None)))
    )


def _is_asked(node: ast.AST, source: SourcePart) -> bool:
    """Whether what is named here is compared, asked for, or kept for the backward pass."""
    for _, parent, _ in source.climb(node):
        if isinstance(parent, ast.Compare):
            return True
        if isinstance(parent, ast.Call):
            name = getattr(parent.func, "id", getattr(parent.func, "attr", ""))
            return name in ASKS or name.startswith(KEEPS)
        if isinstance(parent, ast.stmt):
            return False
    return False


def _words(node: ast.expr | ast.FunctionDef) -> str:
    text = f"{node.name}()" if isinstance(node, ast.FunctionDef) else " ".join(ast.unparse(node).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def unused(modules: Mapping[str, nn.Module], ways: Ways) -> Iterator[Condition]:
    """Modules without weights that no run has called, and functions in lists that modules hold.

    Of modules with weights it is said elsewhere that they stay whole.

    Args:
        modules: of what ran, by qualified name.
        ways: all that ran.
    """
    found: list[str] = []
    ran = {id(each.code) for each in ways.pieces}
    for name, module in modules.items():
        known = name in ways.modules or any(True for _ in module.parameters()) or _is_harmless(module)
        if not known and not any(name.startswith(f"{outer.partition(' ')[0]}.") for outer in found):
            found.append(f"{name} ({type(module).__name__})")
        for attribute, value in vars(module).items() if not type(module).__module__.startswith("torch.") else ():
            if not attribute.startswith("_") and any(_is_held_back(each, ran, ways) for each in _items(value)):
                found.append(f"{name}.{attribute} ({type(value).__name__})".lstrip("."))
    if found:
        yield Condition(f"holds where what was not called on the example stays so: {listed(found)}")


def _items(value: object) -> Collection[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()


def _is_held_back(value: object, ran: Collection[int], ways: Ways) -> bool:
    """Whether something in a list is a function, or an object that is called like one, that no run has called."""
    value = value.func if isinstance(value, partial) else value
    if isinstance(value, (type, nn.Module)) or not callable(value):
        return False
    function = (
        value
        if isinstance(value, (FunctionType, MethodType))
        else inspect.getattr_static(type(value), "__call__", None)
    )
    plain = plain_function(function) if isinstance(function, (FunctionType, MethodType)) else None
    if plain is not None and is_watched(plain.__code__.co_filename):
        return id(plain.__code__) not in ran and not _does_nothing(plain.__code__)
    return _is_operator(value) and getattr(value, "__name__", "").strip("_") not in ways.called


def _is_harmless(module: nn.Module) -> bool:
    kind = type(module).__module__
    if kind.endswith(".activation") and kind.startswith("torch."):
        return not hasattr(module, "dim")  # softmax and the like are no functions of each unit alone
    return kind.startswith("torch.nn.modules.") and kind.rpartition(".")[2] in HARMLESS
