"""Decisions of code that ran, and which of their sides were seen: from its bytecode and its source."""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType

from secateur.structure.ran import DECIDES, HANDLER, Ran
from secateur.structure.read import kept
from secateur.structure.source import (
    COMPREHENSIONS,
    LOOPS,
    TESTED,
    TRIES,
    Position,
    SourcePart,
    is_inside,
    position_of,
    source_of,
)

AHEAD = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE", "JUMP")
ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "RETURN_GENERATOR")
NOTHING = ("NOP", "CACHE", "EXTENDED_ARG", "NOT_TAKEN")
FARTHEST = 500  # instructions that are followed from a jump to where its test is decided


@dataclass(frozen=True)
class OneSided:
    """A decision of which one side was seen.

    Args:
        node: what decides: a statement with a test, a conditional expression, a comprehension that filters, a loop that
            found nothing to do, a chain of `and` or `or` that gives a value, a `match`, or a handler of exceptions.
        seen: the side that was taken: whether the test held, the handler was entered; of `match` the cases' numbers.
        source: in which it stands.
    """

    node: ast.AST
    seen: bool | tuple[int, ...]
    source: SourcePart


@dataclass(frozen=True)
class Jump:
    """A conditional jump, or the next step of a loop.

    Args:
        place: in the bytecode.
        name: of the instruction.
        to: where it goes when it jumps.
        on: where it goes when it does not.
        position: in the source.
    """

    place: int
    name: str
    to: int
    on: int
    position: Position

    def jumped(self, place: int) -> bool:
        """Whether the code went to the far side; interpreters differ in what they skip behind either."""
        return abs(place - self.to) < abs(place - self.on)


class Layout:
    """The instructions of a piece of code, and what its jumps belong to."""

    def __init__(self, code: CodeType, source: SourcePart | None) -> None:
        self.steps = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
        self.number = {step.offset: n for n, step in enumerate(self.steps)}
        self.jumps: dict[int, Jump] = {}
        self.source = source
        self.groups: dict[ast.AST, list[Jump]] = {}
        for n, step in enumerate(self.steps):
            position = position_of_step(step)
            if step.opcode in DECIDES and step.opname != HANDLER and position is not None and n + 1 < len(self.steps):
                if source is not None and step.opname != "FOR_ITER":
                    position = _of_filter(source, position, position_of_step(self.steps[n - 1])) or position
                jump = Jump(step.offset, step.opname, step.argval, self.steps[n + 1].offset, position)
                self.jumps[step.offset] = jump
        # A file that was edited since it was loaded has other words in these places.
        if source is not None and any(jump.position not in source.at for jump in self.jumps.values()):
            self.source = source = None
        for jump in self.jumps.values():
            owner = None if source is None else _owner(source, jump)
            if owner is not None:
                self.groups.setdefault(owner, []).append(jump)

    def decided(self, place: int, group: set[int], spans: Sequence[Position]) -> int | None:
        """Where the code goes on from a place once a test is decided; None where another jump of it comes first."""
        n = self.number.get(place)
        for _ in range(FARTHEST):
            if n is None or n >= len(self.steps):
                return None
            step = self.steps[n]
            if step.offset in group:
                return None
            position = position_of_step(step)
            if step.opname in AHEAD:
                n = self.number.get(step.argval)
            elif step.opname in NOTHING or (
                step.opname not in ENDS and position is not None and any(is_inside(position, span) for span in spans)
            ):
                n += 1
            else:
                return step.offset
        return None

    def alike(self, a: int, b: int) -> bool:
        """Whether two places begin alike: a compiler repeats the end of a function for each way to it."""
        mine, other = self.steps[self.number[a]], self.steps[self.number[b]]
        return (mine.opname, mine.arg) == (other.opname, other.arg)

    def executed(self, ran: Ran) -> set[int]:
        """Places that the code came through, as its decisions tell."""
        seen: set[int] = set()
        taken: dict[int, set[int]] = {}
        for place, to in ran.edges:
            taken.setdefault(place, set()).add(to)
        todo = [0, *(place for place in taken if place not in self.jumps)]  # handlers of exceptions
        while todo:
            n = self.number.get(todo.pop())
            while n is not None and n < len(self.steps):
                step = self.steps[n]
                if step.offset in seen:
                    break
                seen.add(step.offset)
                jump = self.jumps.get(step.offset)
                if jump is not None:
                    ways = {jump.jumped(to) for to in taken.get(jump.place, ())}
                    todo += [jump.to] * (True in ways) + [jump.on] * (False in ways)
                    break
                if step.opname in AHEAD:
                    n = self.number.get(step.argval)
                elif step.opname in ENDS and step.opname != "RETURN_GENERATOR":
                    break
                else:
                    todo += [step.argval] if step.opname == "SEND" else []
                    n += 1
        return seen


def position_of_step(step: dis.Instruction) -> Position | None:
    """Where an instruction stands in the source."""
    p = step.positions
    if p is None or p.lineno is None or p.col_offset is None or p.end_lineno is None or p.end_col_offset is None:
        return None
    return p.lineno, p.col_offset, p.end_lineno, p.end_col_offset


@kept
def _layout(filename: str, code: CodeType) -> Layout:
    # By the file as well: code is equal to code of other files that says the same in the same line.
    return Layout(code, source_of(code))


def layout_of(code: CodeType) -> Layout:
    """The layout of a piece of code; made once."""
    return _layout(code.co_filename, code)


# -- what a jump belongs to ------------------------------------------------------------------------------------------


def _of_filter(source: SourcePart, position: Position, before: Position | None) -> Position | None:
    """The test of a comprehension, whose jump some interpreters place where the element stands."""
    parent, name = source.parents.get(source.at.get(position), (None, ""))  # type: ignore[arg-type]
    if before is None or not isinstance(parent, COMPREHENSIONS) or name not in ("elt", "key", "value"):
        return None
    tests = (position_of(test) for part in parent.generators for test in part.ifs)
    return next((test for test in tests if test is not None and is_inside(before, test)), None)


def _owner(source: SourcePart, jump: Jump) -> ast.AST | None:
    """What a jump decides: see `OneSided.node`; None where nothing of it is left to the code."""
    node = source.node(jump.position)
    if node is None or isinstance(node, (*TRIES, ast.ExceptHandler, ast.With, ast.AsyncWith)):
        return None
    if isinstance(node, (*TESTED, *LOOPS, *COMPREHENSIONS, ast.Match)):
        return node
    chain = node if isinstance(node, ast.BoolOp) else None
    for inner, parent, name in source.climb(node):
        if isinstance(parent, TESTED) and name == "test":
            return parent
        if isinstance(parent, ast.comprehension):
            return source.parents[parent][0] if name == "ifs" or jump.name == "FOR_ITER" else chain
        if isinstance(parent, LOOPS):
            return parent if jump.name == "FOR_ITER" else chain
        if isinstance(parent, (ast.Match, ast.match_case)):
            return source.parents[parent][0] if isinstance(parent, ast.match_case) else parent
        if isinstance(parent, ast.BoolOp):
            chain = parent
        elif not isinstance(parent, ast.pattern) and not _is_part(inner, parent):
            return chain
    return chain


def _is_part(node: ast.AST, of: ast.AST) -> bool:
    """Whether the value of an expression is that of a part of it, or the opposite."""
    if isinstance(of, ast.UnaryOp):
        return isinstance(of.op, ast.Not)
    return isinstance(of, ast.IfExp) and node is not of.test


# -- which sides were seen -------------------------------------------------------------------------------------------


def one_way(ran: Ran) -> Iterator[OneSided]:
    """Decisions of a piece of code that went one way only, as far as its source is known."""
    layout = layout_of(ran.code)
    source = layout.source
    if source is None:
        return
    taken: dict[int, set[bool]] = {}
    for place, to in ran.edges:
        if place in layout.jumps:
            taken.setdefault(place, set()).add(layout.jumps[place].jumped(to))
    for node, jumps in layout.groups.items():
        for kind in (_loop, _chain, _test):
            ways = kind(layout, node, jumps, taken)
            if len(ways) == 1:
                yield OneSided(node, ways.pop(), source)
    yield from _by_place(layout, ran)


def _loop(layout: Layout, node: ast.AST, jumps: list[Jump], taken: dict[int, set[bool]]) -> set[bool]:
    """Whether a loop ran; of one that did, the end is no decision."""
    ways = {way for jump in jumps if jump.name == "FOR_ITER" for way in taken.get(jump.place, ())}
    return {False} if ways == {True} else set()


def _chain(layout: Layout, node: ast.AST, jumps: list[Jump], taken: dict[int, set[bool]]) -> set[bool]:
    """Whether a chain of `and` or `or` that gives a value ended early."""
    if not isinstance(node, ast.BoolOp):
        return set()
    for jump in jumps:
        ways = taken.get(jump.place, set())
        if len(ways) == 1:
            return set(ways)
    return set()


def _test(layout: Layout, node: ast.AST, jumps: list[Jump], taken: dict[int, set[bool]]) -> set[bool]:
    """What a test has given."""
    tests = _tests(node)
    jumps = [jump for jump in jumps if jump.name != "FOR_ITER"]
    if not tests or not jumps:
        return set()
    spans = [p for test in tests if (p := position_of(test)) is not None]
    found: set[bool] = set()
    for copy in _copies(layout, jumps, spans):
        group = {jump.place for jump in copy}
        last = copy[-1]
        holds = _holds_when_it_jumps(last, tests[-1])
        to, on = (layout.decided(place, group, spans) for place in (last.to, last.on))
        yes, no = (to, on) if holds else (on, to)
        if yes == no:  # both sides are one
            continue
        if isinstance(node, COMPREHENSIONS) and len(found) == 1:  # each loop has its own filter
            return found
        for jump in copy:
            for way in taken.get(jump.place, ()):
                place = layout.decided(jump.to if way else jump.on, group, spans)
                if jump is last:
                    found.add(way == holds)
                elif place is not None and place in (yes, no):
                    found.add(place == yes)
                elif place is not None and no is not None:
                    found.add(not layout.alike(place, no))
    if isinstance(node, ast.While) and True in found:
        return set()
    return found


def _tests(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, TESTED):
        return [node.test]
    if isinstance(node, COMPREHENSIONS):
        return [test for part in node.generators for test in part.ifs]
    return []


def _copies(layout: Layout, jumps: list[Jump], spans: Sequence[Position]) -> Iterator[list[Jump]]:
    """Jumps of a test, which a compiler may have written down several times."""
    copy: list[Jump] = []
    for jump in sorted(jumps, key=lambda jump: jump.place):
        if copy:
            between = layout.steps[layout.number[copy[-1].place] + 1 : layout.number[jump.place]]
            positions = [
                p for step in between if step.opname not in AHEAD and (p := position_of_step(step)) is not None
            ]
            if not all(p == jump.position or any(is_inside(p, span) for span in spans) for p in positions):
                yield copy
                copy = []
        copy.append(jump)
    if copy:
        yield copy


def _holds_when_it_jumps(jump: Jump, test: ast.expr) -> bool:
    """Whether a test holds when its last jump is taken."""
    turned = False
    while True:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            turned, test = not turned, test.operand
        elif isinstance(test, ast.BoolOp):
            test = test.values[-1]
        elif isinstance(test, ast.IfExp):
            test = test.orelse
        else:
            break
    if jump.name.endswith("NONE"):
        same = isinstance(test, ast.Compare) and isinstance(test.ops[-1], ast.Is)
        return (same == (not jump.name.endswith("NOT_NONE"))) != turned
    return ("IF_TRUE" in jump.name) != turned


# -- what has no test: cases and handlers ------------------------------------------------------------------------------


def _by_place(layout: Layout, ran: Ran) -> Iterator[OneSided]:
    assert layout.source is not None
    inside = position_of_code(ran.code)
    found = [node for node in layout.source.at.values() if isinstance(node, (*TRIES, ast.Match))]
    found = [node for node in found if inside is not None and is_inside(_known(node), inside)]
    if not found:
        return
    places = layout.executed(ran)
    positions = [p for place in places if (p := position_of_step(layout.steps[layout.number[place]])) is not None]
    for node in found:
        if isinstance(node, ast.Match):
            yield from _cases(layout, node, positions)
        elif isinstance(node, TRIES) and _ran_in(node.body[:1], positions):
            for handler in node.handlers:
                entered = _ran_in(handler.body, positions)
                yield OneSided(handler, entered, layout.source)


def _cases(layout: Layout, node: ast.Match, positions: Sequence[Position]) -> Iterator[OneSided]:
    assert layout.source is not None
    entered = tuple(n for n, case in enumerate(node.cases) if _ran_in(case.body, positions))
    if not _ran_in([node.subject], positions):
        return
    whole = isinstance(node.cases[-1].pattern, ast.MatchAs) and node.cases[-1].pattern.pattern is None
    if len(entered) < len(node.cases) or not whole:
        yield OneSided(node, entered, layout.source)


def _ran_in(block: Sequence[ast.AST], positions: Sequence[Position]) -> bool:
    spans = [_known(node) for node in block]
    return any(is_inside(position, span) for position in positions for span in spans)


def _known(node: ast.AST) -> Position:
    return position_of(node) or (0, 0, 0, 0)


@kept
def position_of_code(code: CodeType) -> Position | None:
    """The part of a file that a piece of code was made of."""
    known = [p for p in code.co_positions() if None not in p and p[1] is not None]
    if not known:
        return None
    ends = [(p[1], p[3]) for p in known]
    return (code.co_firstlineno, 0, *max(ends))  # type: ignore[return-value]
