"""Values that an earlier run has left on a module: a fresh model makes them anew, perhaps of the sizes of a cut.

No state dict holds them. A model that has run before it was planned keeps what it had made, and so do its copies, and
that is what the proof has seen; the same weights loaded into a new model meet an attribute that is not there yet.
Where an `if` decides whether to make it, the decision is a condition already; here are those that ask nothing.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from secateur.model.place import short
from secateur.structure.asked import definition, receivers
from secateur.structure.read import nodes_of
from secateur.structure.switches import Forwards, chain_of, held_at
from secateur.types import Condition


def memos(own: Forwards) -> Iterator[Condition]:
    """One condition for each line that reads a value which was made once: a cached property, an entry of a table.

    Args:
        own: what `secateur.structure.switches.forwards` says of the model.
    """
    said: set[tuple[str, str]] = set()
    for path, (module, functions) in own.items():
        for function in functions:
            node = definition(function.__code__)
            for part in nodes_of(node) if node is not None else ():
                name = _made_before(part, receivers(function), module)
                where = f"{short(function.__code__.co_filename)}:{getattr(part, 'lineno', 0)}"
                if name and (name, where) not in said:
                    said.add((name, where))
                    text = f"holds with {name} as an earlier run has left it on {type(module).__name__}"
                    yield Condition(f"{text}; a fresh model makes it anew", where, path)


def _made_before(node: ast.AST, this: tuple[str, ...], module: nn.Module) -> str:
    """The name of what a node reads, where that was made once and is there; "" for anything else."""
    if isinstance(node, ast.Attribute):
        *owners, last = next(filter(None, (chain_of(node, name) for name in this)), ("",))
        owner = held_at(module, tuple(owners))
        return ".".join((*owners, last)) if last and _is_cached(owner, last) else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setdefault":
        return _entry(node.func.value, node.args[0] if node.args else None, this, module)
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        held = _table(node.value, this, module)
        return ast.unparse(node.value) if held and hasattr(type(held), "__missing__") else ""
    return ""


def _is_cached(owner: object, name: str) -> bool:
    """Whether an attribute hides a descriptor that would make it: `functools.cached_property`, or one like it."""
    if name not in getattr(owner, "__dict__", {}):
        return False
    maker = inspect.getattr_static(type(owner), name, None)
    makes = hasattr(type(maker), "__get__") and not hasattr(type(maker), "__set__")
    return makes and not isinstance(maker, (FunctionType, staticmethod, classmethod))


def _entry(table: ast.expr, key: ast.expr | None, this: tuple[str, ...], module: nn.Module) -> str:
    """What `setdefault` finds: an attribute, where the table is that of the attributes, or any entry."""
    held = _table(table, this, module)
    if held is vars(module):
        found = isinstance(key, ast.Constant) and key.value in held
        return str(key.value) if isinstance(key, ast.Constant) and found else ""
    return ast.unparse(table) if held else ""


def _table(node: ast.expr, this: tuple[str, ...], module: nn.Module) -> dict[object, object] | None:
    """The mapping that an expression stands for: one that the module holds, or that of its attributes."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars" and node.args:
        return vars(module) if isinstance(node.args[0], ast.Name) and node.args[0].id in this else None  # type: ignore[return-value]
    chain = next(filter(None, (chain_of(node, name) for name in this)), None)
    if chain == ("__dict__",):
        return vars(module)  # type: ignore[return-value]
    held = None if chain is None else held_at(module, chain)
    return held if isinstance(held, dict) else None
