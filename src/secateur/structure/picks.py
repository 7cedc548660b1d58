"""Picks without a branch: a module or a function is taken out of several by a value that nobody follows."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from secateur.structure.ran import Ran
from secateur.structure.sides import layout_of, position_of_code, position_of_step
from secateur.structure.source import COMPREHENSIONS, LOOPS, Position, SourcePart, is_inside, position_of

LONGEST = 60  # letters of an expression
LOOK_UPS = ("get", "pop", "setdefault")
WALKS = ("range", "enumerate", "zip", "reversed", "sorted", "items", "keys", "named_children", "named_modules")


def picks(piece: Ran) -> Iterator[tuple[ast.expr, str]]:
    """Expressions that ran and picked what is called out of several by a key that is no constant, with their words."""
    layout = layout_of(piece.code)
    source, inside = layout.source, position_of_code(piece.code)
    if source is None or inside is None:
        return
    found = [node for node in source.at.values() if _key(node) is not None and is_inside(_place(node), inside)]
    found = [node for node in found if _is_called(node, source) and not _is_walk(node, source)]
    if not found:
        return
    places = layout.executed(piece)
    ran = {position_of_step(layout.steps[layout.number[place]]) for place in places}
    for node in found:
        if isinstance(node, ast.expr) and _place(node) in ran:
            text = ast.unparse(node)
            text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
            yield node, f"holds where `{text}` picks what it picked on the example; the others were not seen there"


def _place(node: ast.AST) -> Position:
    return position_of(node) or (0, 0, 0, 0)


def _key(node: ast.AST) -> ast.expr | None:
    """By what something is picked, unless that is a constant."""
    key: ast.expr | None = None
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        key = node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        key = node.args[1] if len(node.args) > 1 else None
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOK_UPS:
        key = node.args[0] if node.args else None
    return None if key is None or _is_constant(key) else key


def _is_constant(node: ast.expr) -> bool:
    parts = (part for part in ast.walk(node) if isinstance(part, ast.expr))
    return all(isinstance(part, (ast.Constant, ast.UnaryOp, ast.Slice, ast.Tuple, ast.BinOp)) for part in parts)


def _is_called(node: ast.AST, source: SourcePart) -> bool:
    """Whether what was picked is called: at once, or by the name that it is given."""
    parent, name = source.parents.get(node, (None, ""))
    if isinstance(parent, ast.Call) and name == "func":
        return True
    if isinstance(parent, ast.Attribute) and isinstance(source.parents.get(parent, (None, ""))[0], ast.Call):
        return parent.attr in ("forward", "__call__")
    if isinstance(parent, ast.IfExp):
        return _is_called(parent, source)
    names = {target.id for target in getattr(parent, "targets", ()) if isinstance(target, ast.Name)}
    if isinstance(parent, (ast.AnnAssign, ast.NamedExpr)) and isinstance(parent.target, ast.Name):
        names.add(parent.target.id)
    calls = (each.func for each in source.at.values() if isinstance(each, ast.Call)) if names else ()
    return any(isinstance(function, ast.Name) and function.id in names for function in calls)


def _is_walk(node: ast.AST, source: SourcePart) -> bool:
    """Whether the key is what a loop around counts or goes through: all of them are taken, one after the other."""
    key = _key(node)
    counted: set[str] = set()
    for _, parent, _ in source.climb(node):
        loops = (
            parent.generators if isinstance(parent, COMPREHENSIONS) else [parent] if isinstance(parent, LOOPS) else []
        )
        for loop in loops:
            goes = loop.iter.func if isinstance(loop.iter, ast.Call) else None
            name = goes.id if isinstance(goes, ast.Name) else getattr(goes, "attr", "")
            if name in WALKS:
                counted |= {part.id for part in ast.walk(loop.target) if isinstance(part, ast.Name)}
    return isinstance(key, ast.Name) and key.id in counted
