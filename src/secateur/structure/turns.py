"""What the loop over the blocks of a stack does with their places: blocks that move up are given those of others."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType

from secateur.model.place import short
from secateur.structure.here import HERE, TORCH
from secateur.structure.source import COMPREHENSIONS, LOOPS, SourcePart, is_inside, position_of, source_of
from secateur.types import Condition

CALLS = (f"{TORCH}/nn/modules/module.py", f"{TORCH}/_dynamo", f"{TORCH}/utils/_contextlib.py")
OWN = re.compile(r"past|cache|state|memory|mems|kv|head_mask")  # lists of which every block has its own entry
DEEPEST = 4  # frames between a block and the loop that calls it
MOST_LINES = 6
LONGEST = 60  # letters of an expression

Site = tuple[CodeType, int, int]  # code, line, and which of its runs


def sites(skip: str = HERE) -> list[Site]:
    """Where the module that is about to run is called from: the user's frames, from the innermost on."""
    frame: FrameType | None = sys._getframe(1)
    found: list[Site] = []
    while frame is not None and len(found) < DEEPEST:
        name = frame.f_code.co_filename
        if not name.startswith((skip, *CALLS)):
            if name.startswith(TORCH):  # a Sequential knows no places
                break
            found.append((frame.f_code, frame.f_lineno, id(frame)))
        frame = frame.f_back
    return found


def by_place(path: str, called: Sequence[Sequence[Site]]) -> Iterator[Condition]:
    """One condition for each line of the loop that uses the place of a block for more than to fetch it.

    Args:
        path: of the stack.
        called: where each of its blocks was called from, as `sites` gives it.
    """
    found = _loop([each for each in called if each])
    if found is None:
        return
    source, loop, code = found
    lines: dict[int, str] = {}
    of_turn, carried = _of_the_turn(loop), _carried(loop)
    inside = _uses(source, loop, path.rpartition(".")[2], of_turn | carried)
    for node, name in (*inside, *_used_behind(source, loop, carried), *_taken_by_number(source, loop)):
        text = ast.unparse(node)
        text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
        place = "which tells the place of a block" if name in of_turn else "which the loop changes from block to block"
        what = f"`{name}`, {place} of {path or 'the model'}" if name else "what comes next"
        said = f"holds where `{text}` is alike for blocks in their old and new places: it uses {what}"
        lines.setdefault(getattr(node, "lineno", 0), said)
    more = len(lines) - MOST_LINES
    for n, (line, said) in enumerate(sorted(lines.items())[:MOST_LINES]):
        last = f"; {more} more such lines are left out" if more > 0 and n == MOST_LINES - 1 else ""
        yield Condition(said + last, f"{short(code.co_filename)}:{line}", path.rpartition(".")[0])


def _loop(called: Sequence[Sequence[Site]]) -> tuple[SourcePart, ast.AST, CodeType] | None:
    """The loop that all blocks are called from: the innermost that stands around the same line of the same run."""
    for depth in range(min(map(len, called), default=0)):
        codes = {id(each[depth][0]): each[depth][0] for each in called}
        if len(codes) > 1 or len({each[depth][2] for each in called}) > 1:
            continue
        code = next(iter(codes.values()))
        source = source_of(code)
        if source is None:
            return None
        around = [_around(source, each[depth][1]) for each in called]
        if around[0] is not None and all(loop is around[0] for loop in around):
            return source, around[0], code
    return None


def _around(source: SourcePart, line: int) -> ast.AST | None:
    """The innermost loop around a line."""
    loops = [n for n in source.at.values() if isinstance(n, (*LOOPS, ast.While, *COMPREHENSIONS))]
    inside = [n for n in loops if n.lineno <= line <= (n.end_lineno or 0)]
    return max(inside, key=lambda n: (n.lineno, n.col_offset), default=None)


def _uses(source: SourcePart, loop: ast.AST, stack: str, names: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Expressions in a loop that use one of these names for more than to fetch a block, and the name."""
    spans = [p for part in _body(loop) if (p := position_of(part)) is not None]
    for position, node in sorted(source.at.items()):
        if not any(is_inside(position, span) for span in spans):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next":
            yield node, ""
        if not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names):
            continue
        parent, role = source.parents[node]
        if not (_fetches(parent, role, stack) or _counts_on(source, node, names)):
            yield (parent if isinstance(parent, ast.expr) else node), node.id


def _body(loop: ast.AST) -> Sequence[ast.AST]:
    if isinstance(loop, COMPREHENSIONS):
        return [loop.elt] if not isinstance(loop, ast.DictComp) else [loop.key, loop.value]
    return loop.body  # type: ignore[attr-defined,no-any-return]


def _of_the_turn(loop: ast.AST) -> set[str]:
    """Names that have another value in each turn, without those that are called, which are the blocks themselves."""
    names: set[str] = set()
    for target in _targets(loop):
        names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    parts = [part for statement in _body(loop) for part in ast.walk(statement)]
    for part in parts:
        if isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name) and _is_plain(part.value):
            names.add(part.target.id)
        elif isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name):
            own = part.targets[0].id
            inner = {each.id for each in ast.walk(part.value) if isinstance(each, ast.Name)}
            calls = any(isinstance(each, ast.Call) for each in ast.walk(part.value))
            names |= {own} if own in inner and not calls and _steps(part.value) else set()
    called = {part.func for part in parts if isinstance(part, ast.Call)}
    blocks = {f.id for f in called if isinstance(f, ast.Name)}
    blocks |= {f.value.id for f in called if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)}
    # A function that runs the block for the loop (a checkpoint) is given it as its first argument.
    blocks |= {p.args[0].id for p in parts if isinstance(p, ast.Call) and p.args and _hands_on(p)}  # type: ignore[attr-defined]
    return names - blocks


def _carried(loop: ast.AST) -> set[str]:
    """Names that a turn makes of themselves for the next one: all but the hidden state, which blocks hand on."""
    turn = {part.id for target in _targets(loop) for part in ast.walk(target) if isinstance(part, ast.Name)}
    if not turn or isinstance(loop, COMPREHENSIONS):
        return set()
    given = [pair for statement in _body(loop) for part in ast.walk(statement) for pair in _given(part)]
    handed: set[str] = set()
    known = -1
    while len(handed) > known:
        known = len(handed)
        handed |= {name for name, value, _ in given if _runs(value, turn) or _source_of(value) in handed}
    made = {name for name, value, own in given if own or _mentions(value, {name})}
    # A tuple that grows by each block's state has another length without some: nobody takes it for the same.
    return made - handed - {name for name, value, _ in given if _is_longer(value)}


def _used_behind(source: SourcePart, loop: ast.AST, names: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Where what a loop has gathered is used first, behind it."""
    said: set[str] = set()
    for _, node in sorted(source.at.items()):
        behind = isinstance(node, ast.Name) and node.lineno > (getattr(loop, "end_lineno", 0) or 0)
        if behind and isinstance(node.ctx, ast.Load) and node.id in names - said:  # type: ignore[attr-defined]
            said.add(node.id)  # type: ignore[attr-defined]
            yield node, node.id  # type: ignore[attr-defined]


def _taken_by_number(source: SourcePart, loop: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Where one of the states that a loop has gathered is taken by its number, behind it."""
    parts = [part for statement in _body(loop) for part in ast.walk(statement)]
    gathered = {name for part in parts for name, value, _ in _given(part) if _is_longer(value)}
    appends = [part.func for part in parts if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute)]
    gathered |= {f.value.id for f in appends if f.attr in ("append", "extend") and isinstance(f.value, ast.Name)}
    for _, node in sorted(source.at.items()):
        behind = isinstance(node, ast.Subscript) and node.lineno > (getattr(loop, "end_lineno", 0) or 0)
        if behind and isinstance(node.value, ast.Name) and node.value.id in gathered:  # type: ignore[attr-defined]
            yield node, node.value.id  # type: ignore[attr-defined]


def _given(part: ast.AST) -> Iterator[tuple[str, ast.expr, bool]]:
    """Names that a statement gives a value to, the value, and whether it is added to what they were."""
    if isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
        yield part.target.id, part.value, True
    elif isinstance(part, ast.Assign):
        for each in (each for target in part.targets for each in ast.walk(target)):
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                yield each.id, part.value, False


def _is_longer(value: ast.expr) -> bool:
    parts = (value.left, value.right) if isinstance(value, ast.BinOp) else (value,)
    return any(isinstance(part, (ast.Tuple, ast.List)) for part in parts)


def _mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _runs(value: ast.expr, turn: set[str]) -> bool:
    """Whether a value comes from a call of the block, or from one that the block is given to."""
    return any(isinstance(part, ast.Call) and _mentions(part, turn) for part in ast.walk(value))


def _source_of(value: ast.expr) -> str:
    """The name of which a value is a part, or which it is; "" for anything else."""
    while isinstance(value, (ast.Subscript, ast.Attribute, ast.IfExp)):
        value = value.body if isinstance(value, ast.IfExp) else value.value
    return value.id if isinstance(value, ast.Name) else ""


def _targets(loop: ast.AST) -> list[ast.expr]:
    if isinstance(loop, COMPREHENSIONS):
        return [part.target for part in loop.generators]
    return [loop.target] if isinstance(loop, LOOPS) else []


def _hands_on(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return isinstance(call.args[0], ast.Name) and "checkpoint" in name


def _steps(value: ast.expr) -> bool:
    """Whether a value is the one before it, counted on or turned round."""
    if isinstance(value, ast.UnaryOp):
        return True
    return isinstance(value, ast.BinOp) and (_is_plain(value.right) or _is_plain(value.left))


def _is_plain(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, bool)


def _fetches(parent: ast.AST, role: str, stack: str) -> bool:
    """Whether a place fetches the block, or what each block has of its own in a cache."""
    if not isinstance(parent, ast.Subscript) or role != "slice":
        return False
    of = parent.value
    name = of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")
    return name == stack or OWN.search(name) is not None


def _counts_on(source: SourcePart, node: ast.AST, names: set[str]) -> bool:
    """Whether a name is used to give itself its next value."""
    for _, parent, _ in source.climb(node):
        if isinstance(parent, ast.Assign):
            target = parent.targets[0]
            return isinstance(target, ast.Name) and target.id in names
        if isinstance(parent, ast.stmt):
            return isinstance(parent, ast.AugAssign)
    return False
