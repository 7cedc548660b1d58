"""The source of code that ran: which expression stands at a place of it, and in what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType

from secateur.structure.read import kept, lines_of_file, tree_of

Position = tuple[int, int, int, int]  # first line, first column, last line, last column
LOOPS = (ast.For, ast.AsyncFor)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
TESTED = (ast.If, ast.While, ast.Assert, ast.IfExp)
TRIES = (ast.Try, ast.TryStar)
DEFINITIONS = ("def ", "async def ")
QUIET = ("warn", "warning", "warning_once", "warning_advice", "info", "debug", "error", "log", "print")


class SourcePart:
    """A part of a file, and where everything in it stands.

    Args:
        tree: the part.
        first: its first line.
        last: its last line.
    """

    def __init__(self, tree: ast.AST, first: int, last: int) -> None:
        self.tree, self.first, self.last = tree, first, last
        self.parents: dict[ast.AST, tuple[ast.AST, str]] = {}
        self.at: dict[Position, ast.AST] = {}
        for node in ast.walk(tree):
            for name, value in ast.iter_fields(node):
                for child in value if isinstance(value, list) else (value,):
                    if isinstance(child, ast.AST):
                        self.parents[child] = node, name
            position = position_of(node)
            if position is not None:
                self.at[position] = node  # of several at one place the innermost, which comes last

    def node(self, position: Position) -> ast.AST | None:
        """What stands at a place, or around it as closely as possible."""
        found = self.at.get(position)
        if found is not None:
            return found
        around = [each for each in self.at if is_inside(position, each)]
        return self.at[max(around, key=lambda p: (p[0], p[1], -p[2], -p[3]))] if around else None

    def climb(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST, str]]:
        """(what is inside, what it stands in, as what), from a node outwards."""
        while node in self.parents:
            parent, name = self.parents[node]
            yield node, parent, name
            node = parent

    def following(self, statement: ast.AST) -> list[ast.stmt]:
        """Statements that come after this one in its block."""
        if statement not in self.parents:
            return []
        parent, name = self.parents[statement]
        block = getattr(parent, name)
        return block[block.index(statement) + 1 :] if isinstance(block, list) else []


def position_of(node: ast.AST) -> Position | None:
    """Where a node stands."""
    if not hasattr(node, "lineno"):
        return None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def is_inside(a: Position, b: Position) -> bool:
    """Whether one part of a file lies in another."""
    return b[:2] <= a[:2] and a[2:] <= b[2:]


def source_of(code: CodeType) -> SourcePart | None:
    """The function that code was compiled from, or the whole file where it is a part of an expression."""
    first, last = lines_of(code)
    if code.co_name.startswith("<"):
        first, last = _around(code.co_filename, first, last)
    part = _function(code.co_filename, first, last) if first > 0 else ""
    return (_source(part, first, last) if part else None) or _whole(code.co_filename)


def _around(filename: str, first: int, last: int) -> tuple[int, int]:
    """The lines of the function that an expression stands in; (0, 0) where it seems to stand in none."""
    lines = lines_of_file(filename)
    starts = [n for n in range(min(first, len(lines)), 0, -1) if lines[n - 1].lstrip().startswith(DEFINITIONS)]
    for start in starts:
        depth = _depth(lines[start - 1])
        end = next((n for n in range(start + 1, len(lines) + 1) if 0 <= _depth(lines[n - 1]) <= depth), len(lines) + 1)
        # A closing bracket of the arguments stands as far to the left as the definition.
        while end <= len(lines) and lines[end - 1].lstrip().startswith((")", "]")):
            end = next(
                (n for n in range(end + 1, len(lines) + 1) if 0 <= _depth(lines[n - 1]) <= depth), len(lines) + 1
            )
        if end > last:
            return start, end - 1
    return 0, 0


def _depth(line: str) -> int:
    """How far to the right a line begins; -1 where nothing stands in it."""
    return len(line) - len(line.lstrip()) if line.strip() else -1


@kept
def _whole(filename: str) -> SourcePart | None:
    tree = tree_of(filename)
    return SourcePart(tree, 1, 1 << 30) if tree.body else None


@lru_cache(maxsize=4096)
def _source(part: str, first: int, last: int) -> SourcePart | None:
    try:
        tree = ast.parse(part)
    except (SyntaxError, ValueError):
        return None
    if part.startswith("if 1:\n"):
        ast.increment_lineno(tree, -1)
    return SourcePart(ast.increment_lineno(tree, first - 1), first, last)


def _function(filename: str, first: int, last: int) -> str:
    """The lines of a function, which a block around it lets stand as far to the right as they do."""
    lines = lines_of_file(filename)[first - 1 : last]
    text = "".join(lines)
    return f"if 1:\n{text}" if text[:1].isspace() else text


def lines_of(code: CodeType) -> tuple[int, int]:
    """The first and the last line of code, and of what is defined in it."""
    last = max((p[1] for p in code.co_positions() if p[1] is not None), default=code.co_firstlineno)
    inner = [lines_of(each)[1] for each in code.co_consts if isinstance(each, CodeType)]
    return code.co_firstlineno, max([last, *inner])


# -- sides that need not be named ----------------------------------------------------------------------------------


def fails(block: list[ast.stmt]) -> bool:
    """Whether a block ends in an error: nobody gets a wrong answer there."""
    for statement in block:
        if isinstance(statement, ast.Raise):
            return True
        if isinstance(statement, ast.If) and fails(statement.body) and fails(statement.orelse):
            return True
        if any(isinstance(part, (ast.Return, ast.Break, ast.Continue)) for part in ast.walk(statement)):
            return False
    return False


def is_idle(block: list[ast.stmt]) -> bool:
    """Whether a block does nothing to what is computed: it warns, logs, checks or passes."""
    return all(_idle(statement) for statement in block)


def _idle(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return is_idle(node.body) and is_idle(node.orelse)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or (isinstance(node.value, ast.Call) and _is_quiet(node.value.func))
    return isinstance(node, (ast.Pass, ast.Assert, ast.Raise))


def _is_quiet(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in QUIET


def is_truth(node: ast.expr) -> bool:
    """Whether an expression gives True or False, and does nothing else: what follows from it is decided elsewhere."""
    if isinstance(node, ast.BoolOp):
        return all(is_truth(value) for value in node.values)
    if isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        return not any(isinstance(part, (ast.Call, ast.NamedExpr)) and not _asks(part) for part in ast.walk(node))
    if isinstance(node, ast.Call):
        return _asks(node) and getattr(node.func, "id", "") != "len"
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _asks(node: ast.AST) -> bool:
    names = ("isinstance", "issubclass", "hasattr", "callable", "len", "bool", "all", "any", "type", "getattr", "int")
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
