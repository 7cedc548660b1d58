"""Ways through the user's code that no run has gone: each decision that only went one way is a condition.

What decides does not matter: a size in a set, a random draw, the length of a list, a text, the next of an iterator.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType

from torch import nn

from secateur.model.modules import named_modules
from secateur.model.place import short
from secateur.structure.asked import plain_function, targets
from secateur.structure.picks import picks
from secateur.structure.ran import Ran, Ways, decides, is_installed
from secateur.structure.remembered import remembering
from secateur.structure.sides import OneSided, layout_of, one_way
from secateur.structure.source import COMPREHENSIONS, LOOPS, fails, is_idle, is_truth
from secateur.structure.uncalled import uncalled, unused
from secateur.types import Condition

MOST_LINES = 4  # of one file that are said in full; the lines of the others are listed
LONGEST = 60  # letters of a test
SKIPPED = ("__init__", "__new__", "__post_init__", "__eq__", "__repr__")  # of classes that are generated without source


@dataclass(frozen=True)
class Said:
    """What is said of one line.

    Args:
        text: the condition.
        line: where it stands.
        last: the last line of what decides.
        module: qualified name of the module that ran there first.
    """

    text: str
    line: int
    last: int
    module: str


def untaken(model: nn.Module, ways: Ways, named: Sequence[Condition] = ()) -> Iterator[Condition]:
    """One condition for each decision of which one side was not seen, and whose other side does something.

    Args:
        model: what ran.
        ways: what the runs have shown.
        named: conditions that are said already; their lines are not said again.
    """
    modules = dict(named_modules(model))
    mine = {code.co_filename for module in modules.values() if (code := _forward(module)) is not None}
    known = {condition.where for condition in named}
    files: dict[str, dict[int, Said]] = {}
    beside: set[str] = set()
    for code, said in _all(modules, ways):
        name = short(code.co_filename)
        # Of what a library does around its models (its decorators, outputs, configs) one line says where to look.
        if code.co_filename not in mine and is_installed(code.co_filename):
            beside.add(name)
        if not any(f"{name}:{line}" in known for line in range(said.line, said.last + 1)):
            files.setdefault(name, {}).setdefault(said.line, said)
    for name, lines in files.items():
        yield from _shortened(name, [lines[line] for line in sorted(lines)], 0 if name in beside else MOST_LINES)
    yield from unused(modules, ways)


def _forward(module: nn.Module) -> CodeType | None:
    function = plain_function(type(module).forward)
    return None if function is None else function.__code__


def _shortened(name: str, found: Sequence[Said], most: int) -> Iterator[Condition]:
    """What is said of a file: some lines in full, the others as a list."""
    nowhere = name.startswith("<") or "/<" in name
    full = 0 if nowhere else most if len(found) > max(most, 1) + 1 else len(found)
    for said in found[:full]:
        yield Condition(said.text, f"{name}:{said.line}", said.module)
    rest = found[full:]
    if rest:
        lines = ", ".join(str(said.line) for said in rest)
        more = "more " if full else ""
        text = f"holds where {len(rest)} {more}decisions of {name} go as on the example: lines {lines}"
        text += "; the other ways were not seen"
        yield Condition(text, "" if nowhere else f"{name}:{rest[0].line}", rest[0].module)


def _all(modules: Mapping[str, nn.Module], ways: Ways) -> Iterator[tuple[CodeType, Said]]:
    """What is said of all code that ran, of what did not need to run again, and of what was never called."""
    for piece in ways.pieces:
        yield from ((piece.code, said) for said in _of(piece))
        for node, text in uncalled(piece, ways, modules):
            yield piece.code, Said(text, node.lineno, node.end_lineno or node.lineno, piece.module)
    for piece in ways.pieces:
        for code in remembering(piece.code, piece.space, decides):
            text = f"holds where {code.co_qualname}() answers as on the example: it remembers its answers"
            line = code.co_firstlineno
            yield code, Said(f"{text}, and what decides in it was not seen", line, line, piece.module)


def _of(piece: Ran) -> Iterator[Said]:
    """What is said of a piece of code."""
    if not piece.points and layout_of(piece.code).source is None:
        return
    if layout_of(piece.code).source is None:
        yield from _without_source(piece)
        return
    for decision in one_way(piece):
        said = _said(decision)
        if said:
            node = _question(decision.node)
            last = node.end_lineno or node.lineno
            yield Said(f"{said}; the other way was not seen", node.lineno, last, piece.module)
    for node, text in picks(piece):
        yield Said(text, node.lineno, node.end_lineno or node.lineno, piece.module)


def _without_source(piece: Ran) -> Iterator[Said]:
    """Code whose source cannot be read: every jump that went one way."""
    if piece.code.co_name in SKIPPED:
        return
    for jump in layout_of(piece.code).jumps.values():
        ways = {jump.jumped(to) for place, to in piece.edges if place == jump.place}
        if len(ways) == 1 and (jump.name != "FOR_ITER" or ways == {True}):
            line = jump.position[0]
            yield Said("holds where a decision goes as on the example", line, line, piece.module)


# -- words -----------------------------------------------------------------------------------------------------------


def _question(node: ast.AST) -> ast.expr | ast.stmt | ast.ExceptHandler:
    """What a decision is named by."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return node.test
    if isinstance(node, ast.Match):
        return node.subject
    return node  # type: ignore[return-value]


def _said(decision: OneSided) -> str:
    """What is said of a decision; "" where its other side does nothing, or fails."""
    node, seen = decision.node, decision.seen
    if isinstance(node, ast.Match):
        return _of_cases(node, seen if isinstance(seen, tuple) else ())
    if isinstance(node, ast.ExceptHandler):
        return _of_handler(node, decision)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        idle = _is_idle_side(node, bool(seen), decision)
        return (
            "" if idle else f"holds where `{_text(node.test)}` is {seen}{_made(node.test, decision)}, as on the example"
        )
    if isinstance(node, LOOPS):
        return "" if is_idle(node.body) else f"holds where `{_text(node.iter)}` has nothing to go through, as here"
    if isinstance(node, COMPREHENSIONS):
        tests = [test for part in node.generators for test in part.ifs]
        if tests and seen is not False:
            return f"holds where `{_text(tests[-1])}` is {seen} for every item, as on the example"
        return f"holds where every item of `{_text(node)}` goes as on the example"
    if isinstance(node, ast.BoolOp) and not is_truth(node):
        return f"holds where `{_text(node)}` is decided as on the example"
    return ""


def _made(test: ast.expr, decision: OneSided) -> str:
    """What a name that decides was made of, where that stands in one place."""
    test = test.operand if isinstance(test, ast.UnaryOp) else test
    if not isinstance(test, ast.Name):
        return ""
    made = [node for node in decision.source.at.values() if isinstance(node, (ast.Assign, ast.AnnAssign))]
    made = [node for node in made if test.id in set(targets(node)) and node.value is not None]
    one = made[0] if len(made) == 1 else None
    return f" (it is `{_text(one.value)}`)" if one is not None and isinstance(one.value, ast.expr) else ""


def _is_idle_side(node: ast.If | ast.IfExp | ast.While, seen: bool, decision: OneSided) -> bool:
    """Whether the side that was not seen fails, or neither side does anything."""
    if isinstance(node, ast.IfExp):
        return _is_number(node.body, node.orelse, node.test)
    other = node.orelse if seen else node.body
    if fails(other) or (is_idle(node.body) and is_idle(node.orelse)):
        return True
    # Behind a side that leaves, the rest of the block is the other side.
    return seen and not node.orelse and _leaves(node.body) and fails(decision.source.following(node))


def _leaves(block: Sequence[ast.stmt]) -> bool:
    return isinstance(block[-1], (ast.Return, ast.Continue, ast.Break, ast.Raise))


def _is_number(a: ast.expr, b: ast.expr, test: ast.expr) -> bool:
    """Whether numbers with a fraction are chosen between, or a rate by the mode: neither chooses a structure."""
    if all(isinstance(each, ast.Constant) and type(each.value) is float for each in (a, b)):
        return True
    mode = any(isinstance(part, ast.Attribute) and part.attr == "training" for part in ast.walk(test))
    return mode and any(isinstance(each, ast.Constant) and type(each.value) in (int, float) for each in (a, b))


def _of_handler(node: ast.ExceptHandler, decision: OneSided) -> str:
    if fails(node.body):
        return ""
    around = decision.source.parents[node][0]
    if is_idle(node.body) and isinstance(around, (ast.Try, ast.TryStar)) and is_idle(around.body):
        return ""
    kind = _text(node.type) if node.type is not None else "an error"
    happens = "is handled" if decision.seen else "does not occur"
    return f"holds where {kind} {happens} here, as on the example"


def _of_cases(node: ast.Match, entered: Sequence[int]) -> str:
    others = [case for n, case in enumerate(node.cases) if n not in entered]
    idle = is_idle([statement for case in node.cases for statement in case.body])
    if idle or (others and all(fails(case.body) for case in others)):
        return ""
    cases = " or ".join(f"`{_text(node.cases[n].pattern)}`" for n in entered) or "no case"
    return f"holds where `{_text(node.subject)}` is {cases}, as on the example"


def _text(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
