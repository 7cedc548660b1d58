"""Whether a number in the code of a model is settled by the code and its modules, or another run may bring another one.

A literal, an attribute of a module that no method counts on, a constant: they are what they are. How many tensors lie
in a list, whether a tensor is contiguous, how often something was called: those are plain numbers as well, of which
nobody tells where they come from. So the expression is read from its source, back to where its parts were made.
"""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from secateur.structure.asked import TORCH, definition
from secateur.structure.read import kept, nodes_of
from secateur.structure.sides import position_of_code
from secateur.structure.source import COMPREHENSIONS, LOOPS, Position, SourcePart, is_inside, source_of

DEEPEST = 12  # names behind names, and callers behind callers
PLAIN = frozenset(["int", "float", "bool", "abs", "min", "max", "round", "sum", "range", "enumerate", "tuple", "list",
                   "reversed", "zip", "sorted", "slice", "divmod", "pow", "str"])  # fmt: skip
SIZES = ("size", "numel", "nelement")  # of tensors, which are followed while the model runs
MISSING = object()
SETUP = ("__init__", "__new__", "__setstate__", "__post_init__", "reset_parameters", "extra_repr", "train", "eval")
FILLS = ("append", "extend", "insert", "pop", "popleft", "add", "update", "clear", "setdefault", "remove", "discard")
CALLS = ("_call_impl", "_wrapped_call_impl", "inner")  # what torch puts between a module and who calls it


def call_at(frame: FrameType) -> ast.Call | ast.Subscript | None:
    """The call or index that runs now in a frame of the user's."""
    return _call_at(frame.f_code.co_filename, frame.f_code, frame.f_lasti)


@kept
def _call_at(filename: str, code: CodeType, step: int) -> ast.Call | ast.Subscript | None:
    place, source = _position(code, step), source_of(code)
    node = None if source is None or place is None else source.node(place)
    return node if isinstance(node, (ast.Call, ast.Subscript)) else None


@kept
def _positions(filename: str, code: CodeType) -> tuple[tuple[int | None, int | None, int | None, int | None], ...]:
    return tuple(code.co_positions())


def _position(code: CodeType, place: int) -> tuple[int, int, int, int] | None:
    first, last, start, end = _positions(code.co_filename, code)[place // 2]
    if first is None or last is None or start is None or end is None:
        return None
    return first, start, last, end


def is_settled(node: ast.AST, frame: FrameType) -> bool:
    """Whether an expression in a frame gives what every other run will give, as far as its source tells.

    Sizes of tensors count as settled: they are followed by other means. So do the arguments of the model's forward,
    which are conditions of their own.
    """
    return _Reader(frame, DEEPEST).settled(node)


class _Reader:
    """Reads expressions of one frame.

    Args:
        frame: that runs.
        depth: how many names and callers may still be gone back.
    """

    def __init__(self, frame: FrameType, depth: int) -> None:
        self.frame, self.depth = frame, depth
        self.source: SourcePart | None = source_of(frame.f_code)
        self.seen: set[str] = set()

    def settled(self, node: ast.AST | None) -> bool:
        if node is None or isinstance(node, ast.Constant):
            return True
        if isinstance(node, ast.IfExp):  # which of them it is, is a decision like any other
            return self.settled(node.body) and self.settled(node.orelse)
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Subscript):
            return self._is_shape(node.value) or (self._is_still(node.value) and self.settled(node.slice))
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.Tuple, ast.List, ast.Slice,
                             ast.Starred, ast.NamedExpr)):  # fmt: skip
            parts = (part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))
            return all(self.settled(part) for part in parts if not isinstance(getattr(part, "ctx", None), ast.Store))
        return False

    # -- names ----------------------------------------------------------------------------------------------------

    def _name(self, name: str) -> bool:
        code = self.frame.f_code
        if name in self.seen:
            return True
        self.seen.add(name)
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if name in code.co_varnames:
            given = name not in parameters or self._given(name)
            return given and self._assigned(name)
        if name in code.co_freevars or name in code.co_cellvars:
            return "STORE_DEREF" not in _stores(code).get(name, ()) and self._assigned(name)
        return not isinstance(self._value(name), (dict, list)) and not _is_written(self.frame.f_globals, name)

    def _assigned(self, name: str) -> bool:
        """Whether all that a name is given in this function is settled."""
        code = self.frame.f_code
        inside = None if name in code.co_freevars else position_of_code(code)
        return self.source is None or all(self.settled(value) for value in _values(self.source, name, inside))

    def _given(self, name: str) -> bool:
        """Whether an argument is settled where the function was called; one that is left out is."""
        caller, mine = self._caller()
        if caller is None or self.depth <= 0:
            return True
        call = call_at(caller)
        if not isinstance(call, ast.Call):
            return True
        other = _Reader(caller, self.depth - 1)
        found = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
        code = self.frame.f_code
        names = code.co_varnames[mine : code.co_argcount]
        if found is None and name in names and names.index(name) < len(call.args):
            found = call.args[names.index(name)]
        return found is None or other.settled(found)

    def _caller(self) -> tuple[FrameType | None, int]:
        """Who called this function, and how many of its arguments do not stand in the call: that of a method."""
        frame, mine = self.frame.f_back, 0
        while frame is not None and frame.f_code.co_filename.startswith(TORCH) and frame.f_code.co_name in CALLS:
            frame, mine = frame.f_back, 1
        if frame is None or frame.f_code.co_filename.startswith(TORCH):
            return None, 0
        first = self.frame.f_code.co_varnames[:1]
        return frame, mine or int(first in (("self",), ("cls",)))

    def _value(self, name: str) -> object:
        frame = self.frame
        # What a comprehension goes through was made outside of it.
        while name not in frame.f_locals and frame.f_code.co_name.startswith("<") and frame.f_back is not None:
            frame = frame.f_back
        return frame.f_locals.get(name, self.frame.f_globals.get(name, MISSING))

    # -- what stands behind names -----------------------------------------------------------------------------------

    def _owner(self, node: ast.expr) -> object:
        """The object that a chain of names stands for; `MISSING` where finding out would run something."""
        if isinstance(node, ast.Name):
            return self._value(node.id)
        if not isinstance(node, ast.Attribute):
            return MISSING
        owner: Any = self._owner(node.value)
        if owner is MISSING or isinstance(owner, Tensor):
            return MISSING
        if isinstance(owner, nn.Module):
            return next((held[node.attr] for held in _namespaces(owner) if node.attr in held), MISSING)
        return vars(owner).get(node.attr, MISSING) if hasattr(owner, "__dict__") else MISSING

    def _attribute(self, node: ast.Attribute) -> bool:
        """An attribute of a module, a config or a library that no method writes to while it runs."""
        owner = self._owner(node.value)
        if isinstance(owner, Tensor):
            return node.attr == "shape"
        if owner is MISSING or isinstance(owner, (torch.dtype, torch.Size)):
            return False
        return isinstance(owner, ModuleType) or node.attr not in counted(type(owner))

    def _is_still(self, node: ast.expr) -> bool:
        """Whether what is looked up in is settled: a list or table of a module, not one that a function fills."""
        if isinstance(node, (ast.Tuple, ast.List, ast.Dict)):
            return all(self.settled(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))
        return isinstance(node, ast.Attribute) and self._attribute(node)

    def _is_shape(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name) and isinstance(self._value(node.id), torch.Size):
            return True
        if isinstance(node, ast.Attribute) and node.attr == "shape":
            return True
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SIZES

    def _call(self, node: ast.Call) -> bool:
        function = node.func
        if isinstance(function, ast.Attribute):
            owner = self._owner(function.value)
            if function.attr in SIZES and not isinstance(owner, nn.Module):
                return True
            plain = isinstance(owner, ModuleType) and owner.__name__ in ("math", "numpy", "operator")
            return plain and all(self.settled(part) for part in node.args)
        name = function.id if isinstance(function, ast.Name) else ""
        if name == "len" and node.args:
            return self._is_counted(node.args[0])
        return name in PLAIN and all(self._is_gone_through(part) for part in node.args)

    def _is_counted(self, node: ast.expr) -> bool:
        """Whether `len` of this is a size, or of a list that a module holds."""
        if isinstance(self._owner(node), Tensor):
            return True
        return isinstance(node, (ast.Tuple, ast.List)) or (isinstance(node, ast.Attribute) and self._attribute(node))

    def _is_gone_through(self, node: ast.expr) -> bool:
        """Numbers of turns are those of places in what a loop goes through, whatever that is."""
        held = self._owner(node)
        return isinstance(held, (Tensor, nn.Module, list, tuple)) or self.settled(node)


def _namespaces(module: nn.Module) -> Iterator[dict[str, Any]]:
    yield vars(module)
    for name in ("_modules", "_parameters", "_buffers"):
        yield vars(module).get(name, {})
    for kind in type(module).__mro__:
        yield dict(vars(kind))


@kept
def _values(source: SourcePart, name: str, inside: Position | None) -> tuple[ast.expr | None, ...]:
    """What a function gives a name, anywhere in it; something that is not settled where it counts."""
    found: list[ast.expr | None] = []
    for place, node in source.at.items():
        if inside is not None and not is_inside(place, inside):
            continue
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(_stored(target, name) for target in targets):
                # What comes of a count nobody reads from its source: no expression stands for it.
                found.append(ast.Yield() if isinstance(node, ast.AugAssign) else node.value)
        elif isinstance(node, LOOPS) and _stored(node.target, name):
            found.append(node.iter)
        elif isinstance(node, COMPREHENSIONS):
            found += [part.iter for part in node.generators if _stored(part.target, name)]
    return tuple(found)


def _stored(target: ast.expr, name: str) -> bool:
    return any(isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store) and p.id == name for p in ast.walk(target))


@kept
def _stores(code: CodeType) -> dict[str, tuple[str, ...]]:
    """Names that a piece of code gives a value to -> the instructions that do."""
    found: dict[str, tuple[str, ...]] = {}
    for step in dis.get_instructions(code):
        if step.opname.startswith("STORE_"):
            found[str(step.argval)] = (*found.get(str(step.argval), ()), step.opname)
    return found


def _is_written(space: dict[str, object], name: str) -> bool:
    """Whether a function of a module writes to a variable of it."""
    here = [value for value in space.values() if isinstance(value, (FunctionType, type))]
    found = [value.__code__ for value in here if isinstance(value, FunctionType)]
    found += [f.__code__ for kind in here if isinstance(kind, type) for f in vars(kind).values() if _is_function(f)]
    return any("STORE_GLOBAL" in _stores(code).get(name, ()) for code in found)


def _is_function(value: object) -> TypeGuard[FunctionType]:
    return isinstance(value, FunctionType)


@kept
def counted(kind: type) -> frozenset[str]:
    """Attributes that methods of a class write to or fill, other than those that make an instance."""
    found: set[str] = set()
    for base in kind.__mro__ if not kind.__module__.startswith("torch.") else ():
        functions = [f for n, f in vars(base).items() if _is_function(f) and n not in SETUP]
        for node in (definition(f.__code__) for f in functions if not f.__code__.co_filename.startswith(TORCH)):
            found.update(filter(None, map(_filled, nodes_of(node))) if node is not None else ())
    return frozenset(found)


def _filled(node: ast.AST) -> str:
    """The attribute that a node writes to: itself, an item of it, or by a method that fills it."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Attribute):
        return node.value.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLS:
        return node.func.value.attr if isinstance(node.func.value, ast.Attribute) else ""
    return ""
