"""Sizes that meet in a number which is then rounded or bounded: on another input the same cut may show there.

`max(4, int(2 * tokens / experts))` is four for few tokens, however many experts there are. Plain fractions remember no
sizes, so these lines are found in the source of what ran.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from secateur.model.place import short
from secateur.structure.ran import Ran
from secateur.structure.sides import position_of_code
from secateur.structure.source import SourcePart, is_inside, position_of, source_of
from secateur.types import Condition

ROUNDS = ("int", "round", "max", "min", "ceil", "floor", "trunc", "clip", "sorted", "maximum", "minimum")
MODULES = ("math", "np", "numpy", "builtins")
TENSORS = ("torch", "F", "nn")
SIZES = ("size", "numel", "nelement", "len", "float", *ROUNDS)
MIXES = (ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
LONGEST = 60  # letters of an expression
DEEPEST = 6  # names behind names


def rounded(pieces: Iterable[Ran]) -> Iterator[Condition]:
    """One condition for each line that rounds or bounds a number in which at least two sizes meet.

    Args:
        pieces: code that ran.
    """
    known: set[tuple[str, int]] = set()
    for piece in pieces:
        source, inside = source_of(piece.code), position_of_code(piece.code)
        if source is None or inside is None:
            continue
        name = short(piece.code.co_filename)
        for node in _outermost(source):
            place = position_of(node)
            if place is None or not is_inside(place, inside) or (name, node.lineno) in known:
                continue
            if _sizes_meet(source, node):
                known.add((name, node.lineno))
                text = ast.unparse(node)
                text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
                said = f"holds where `{text}` is what it was before the cut; on the inputs that were tried it is"
                yield Condition(said, f"{name}:{node.lineno}", piece.module)


def _outermost(source: SourcePart) -> Iterator[ast.Call]:
    for node in source.at.values():
        if not (isinstance(node, ast.Call) and _rounds(node)):
            continue
        if not any(isinstance(parent, ast.Call) and _rounds(parent) for _, parent, _ in source.climb(node)):
            yield node


def _rounds(node: ast.Call) -> bool:
    function = node.func
    if isinstance(function, ast.Name):
        return function.id in ROUNDS
    return (
        isinstance(function, ast.Attribute)
        and function.attr in ROUNDS
        and isinstance(function.value, ast.Name)
        and function.value.id in MODULES
    )


def _sizes_meet(source: SourcePart, node: ast.AST) -> bool:
    assigned = _assigned(source)
    parts = list(_parts(node, assigned, DEEPEST))
    if any(isinstance(part, ast.Name) and part.id in TENSORS for part in parts):
        return False
    leaves = {ast.unparse(part) for part in parts if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript))}
    mixes = any(isinstance(part, ast.BinOp) and isinstance(part.op, MIXES) for part in parts)
    return mixes and len(leaves) > 1


def _assigned(source: SourcePart) -> dict[str, list[ast.expr]]:
    """What names of a function are given, each by itself."""
    found: dict[str, list[ast.expr]] = {}
    for node in source.at.values():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)) and isinstance(node.target, ast.Name) and node.value:
            found.setdefault(node.target.id, []).append(node.value)
    return found


def _parts(node: ast.AST, assigned: dict[str, list[ast.expr]], depth: int) -> Iterator[ast.AST]:
    """Parts of an expression that say what it is made of: names stand for what they were given."""
    if isinstance(node, ast.Name) and node.id in assigned and depth:
        for value in assigned[node.id]:
            yield from _parts(value, {n: v for n, v in assigned.items() if n != node.id}, depth - 1)
        return
    if isinstance(node, ast.Call):
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        if isinstance(function, ast.Attribute) and not (
            isinstance(function.value, ast.Name) and function.value.id in MODULES
        ):
            if name in SIZES:  # x.size(0): the size of a tensor, whatever that is
                yield ast.Attribute(function.value, ast.unparse(node), ast.Load())
                return
            yield from ([function.value] if isinstance(function.value, ast.Name) else [])
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            yield from _parts(argument, assigned, depth)
        return
    yield node
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        return
    for child in ast.iter_child_nodes(node):
        yield from _parts(child, assigned, depth)
