"""What a run depended on: comparisons of sizes, values that were read, the mode, arguments left at their defaults.

A run sees one path. Every place where another input would have taken another one is written down with its line, and is
what `capture` goes back to, to see the other side as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Protocol

from torch import nn

from secateur.model.modules import named_parameters
from secateur.structure.asked import reading_lines
from secateur.structure.axes import Atom, leaves, lock, resolve, same_axis
from secateur.structure.here import Here
from secateur.structure.provenance import Apply, Attribute, Const, Dim, Expr, dims_in, is_literal
from secateur.structure.read import kept, nodes_of, tree_of
from secateur.structure.trace import Place, SizeUse, Trace
from secateur.types import Condition, Lock

SYMBOLS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "add": "+", "sub": "-", "mul": "*",
    "floordiv": "//", "mod": "%",
}  # fmt: skip
OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
SEEN_ONLY = ("__repr__", "__str__", "__format__", "data_ptr", "storage", "untyped_storage", "_typed_storage")
OF_INPUT = ("a dimension of the model's input", "a number that the example gives", "a number that the data hold")
COMPARED = "compared with a size of the data, so that another input would decide otherwise than in the original"
SEEN = "the other branch was seen, too"  # ends what is said of a branch that a run beside has gone to its end
MOST_NAMES = 6  # of arguments or parameters that one sentence lists


@dataclass(frozen=True)
class Branch:
    """A place where the run could have gone another way.

    Args:
        kind: "size", "rank", "length", "value", "read", "mode", "argument" (a switch that the example leaves at its
            default), "arguments", "default", "given", "form" (what an argument is), "fact" (what a tensor is) or
            "switch" (an attribute).
        condition: what is said about it.
        argument: name of the argument, or what is said of its value, where it is one.
    """

    kind: str
    condition: Condition
    argument: str = ""

    def told(self, outcome: str) -> Condition:
        """The condition, with what came of looking at the other side."""
        return replace(self.condition, text=f"{self.condition.text}; {outcome}")


class Run(Protocol):
    """What a watch has to know of the run that it listens to, which holds the watch in turn."""

    here: Here
    trace: Trace

    def equality(self, expr: Expr) -> None:
        """The code found two sizes equal and went on accordingly."""


def _asks_for_none(expr: Apply) -> bool:
    """Whether a count of elements is compared with 0: what a cut leaves is none only where the original has none."""
    sides = (expr.left, expr.right)
    return any(side == Const(0) for side in sides) and any(_is_product(side) for side in sides)


def _is_product(expr: Expr) -> bool:
    if isinstance(expr, Apply):
        return expr.op == "mul" and _is_product(expr.left) and _is_product(expr.right)
    return isinstance(expr, (Dim, Attribute)) or (isinstance(expr, Const) and expr.value > 0)


@dataclass(eq=False)
class Watch:
    """Is told what the code does with integers and flags, and may tell it the opposite, once.

    Args:
        recorder: of the run.
        turned: line where the first answer is turned round, to see the other branch.
    """

    recorder: Run
    turned: str = ""
    turned_in: str = ""  # the module that was told so
    compared_sizes: list[tuple[Apply, bool, Place]] = field(default_factory=list)
    others: list[Branch] = field(default_factory=list)
    ranks: set[int] = field(default_factory=set)  # atoms that stand for numbers of dimensions and of bytes

    def compared(self, expr: Apply, result: bool) -> bool:
        """The code compared two integers: what it found has to stay so after a cut."""
        recorder = self.recorder
        if recorder.here.function or is_literal(expr):  # in torch, sizes are plain numbers; handlers know better
            return result
        if result == (expr.op == "eq") and expr.op in ("eq", "ne"):
            recorder.equality(Apply("eq", expr.left, expr.right))
        frame = recorder.here.caller()
        if frame is None:
            return result
        place = recorder.here.place()
        if expr.op not in ("eq", "ne") or _asks_for_none(expr):
            found = Place(SYMBOLS[expr.op], place.module, place.where)
            recorder.trace.size_uses.append(SizeUse(expr, int(result), found))
        self.compared_sizes.append((expr, result, place))
        return self.answer(result, place.where)

    def answer(self, result: bool, where: str) -> bool:
        """What the code is told: the opposite, the first time at the line that is being looked at."""
        if not self.turned or where != self.turned:
            return result
        self.turned, self.turned_in = "", self.recorder.here.module
        return not result

    def left(self, expr: Expr, value: int, how: str) -> None:
        """An integer became a key or a text: from there nobody can follow it, so it has to stay what it is."""
        here = self.recorder.here
        if here.function or is_literal(expr) or here.caller() is None:
            return
        place = here.place()
        self.recorder.trace.size_uses.append(SizeUse(expr, value, Place(how, place.module, place.where)))

    def made(self, expr: Apply, value: int) -> None:
        """The code made a whole number of sizes, which may become a size itself, or a bound that nobody sees."""
        here = self.recorder.here
        if here.function or is_literal(expr) or here.caller() is None:
            return
        self.recorder.trace.reckoned.append(SizeUse(expr, value, here.place()))

    def divided(self, expr: Expr) -> None:
        """A size went into a fraction, which is tried as a scale."""
        self.recorder.trace.scales.append(expr)

    def asked_mode(self, training: bool) -> bool:
        """The code branched on `training`."""
        frame = self.recorder.here.caller()
        if frame is not None and not _chooses_a_number(frame):
            place = self.recorder.here.place()
            mode = "train" if training else "eval"
            self._add("mode", f"holds in {mode} mode, which the code asks for", place)
        return training

    def given_mode(self) -> None:
        """The code hands `training` to something that nobody can watch: whether it also branches on it is not known."""
        self._add("mode", "holds in eval mode, which the code hands on", Place())

    def value(self, how: str, value: object) -> None:
        """A value that depends on the input left the graph."""
        place = self.recorder.here.place()
        if isinstance(value, bool):
            self._add("value", f"holds where this value of the data is {value}", place)
        elif how not in SEEN_ONLY:
            number = f", here {value}" if isinstance(value, (int, float)) else ""
            self._add("read", f"holds for data like the example's, of which values are read ({how}{number})", place)

    def length(self, value: int, what: str) -> None:
        """`len` gives a plain number: the lines that decide by it are read from the source."""
        frame = self.recorder.here.caller()
        for where in reading_lines(frame.f_code.co_filename, frame.f_lineno, "len") if frame is not None else ():
            text = f"holds for {value} {what}, which the code counts by len()"
            self._add("length", text, Place("len", self.recorder.here.module, where))

    def rows(self, value: int) -> None:
        """The code goes through the first dimension of a tensor, one turn for each row."""
        self._add("length", f"holds for {value} rows, over which the code loops", self.recorder.here.place())

    def fact(self, name: str, value: object) -> None:
        """What a tensor is (its dtype, its layout, whether it wants gradients) is plain: the source says what for."""
        frame = self.recorder.here.caller()
        for where in reading_lines(frame.f_code.co_filename, frame.f_lineno, name) if frame is not None else ():
            text = f"holds where {name} of this tensor is {value}, by which the code decides"
            self._add("fact", text, Place(name, self.recorder.here.module, where))

    def settle(self) -> None:
        """Where a size of the data was compared with one that could be cut, another input would decide otherwise."""
        weights = {atom.id for axes in self.recorder.trace.tensors().values() for axis in axes for atom in leaves(axis)}
        for expr, _, place in self.compared_sizes:
            if _asks_for_none(expr):
                continue
            dims = [resolve(axis) for axis in dims_in(expr)]
            if any(atom.id not in weights and is_of_input(atom) for axis in dims for atom in leaves(axis)):
                reason = Lock(COMPARED, place.op, place.module, place.where, "compare sizes of the data alone")
                for axis in dims:
                    lock(axis, reason)

    def _add(self, kind: str, text: str, place: Place) -> None:
        branch = Branch(kind, Condition(text, place.where, place.module))
        if not any(b.kind == kind and b.condition.where == place.where for b in self.others):
            self.others.append(branch)

    def branches(self, names: Mapping[int, str]) -> Iterator[Branch]:
        """Every place where other data would have taken another path, each line once."""
        seen: set[str] = set()
        for expr, result, place in self.compared_sizes:
            if place.where not in seen and _on_data(expr):
                seen.add(place.where)
                text = f"holds for {_comparison(expr, result, names)}"
                rank = any(atom.id in self.ranks for axis in dims_in(expr) for atom in leaves(axis))
                yield Branch("rank" if rank else "size", Condition(text, place.where, place.module))
        yield from self.others


def _on_data(expr: Apply) -> bool:
    """Whether a comparison asks for a size of the data, which other inputs change; what is cut is checked by itself."""
    if isinstance(expr.left, Dim) and isinstance(expr.right, Dim) and same_axis(expr.left.axis, expr.right.axis):
        return False
    dims = [resolve(axis) for axis in dims_in(expr)]
    return any(axis.size == 1 or any(atom.locks for atom in leaves(axis)) for axis in dims)


def is_of_input(atom: Atom) -> bool:
    """Whether a dimension comes from what the model is given."""
    return any(each.reason in OF_INPUT for each in atom.locks)


def _comparison(expr: Apply, result: bool, names: Mapping[int, str]) -> str:
    sign = expr.op if result else OPPOSITE[expr.op]
    sizes = ", ".join(str(axis.size) for axis in dims_in(expr))
    return f"{_words(expr.left, names)} {SYMBOLS[sign]} {_words(expr.right, names)} (here {sizes})"


def _words(expr: Expr, names: Mapping[int, str]) -> str:
    if isinstance(expr, Const):
        return str(expr.value)
    if isinstance(expr, Attribute):
        return f"{expr.owner}.{expr.name}".strip(".")
    if isinstance(expr, Dim):
        return " x ".join(names.get(atom.id, "a size") for atom in leaves(expr.axis)) or "a size of 1"
    return f"{_words(expr.left, names)} {SYMBOLS[expr.op]} {_words(expr.right, names)}"


# -- what the code looks like ----------------------------------------------------------------------------------


def _chooses_a_number(frame: FrameType) -> bool:
    """Whether the line is ``number if self.training else ...``: a rate of dropout, and no other structure."""
    chosen = [node for node in _conditionals(frame.f_code.co_filename) if node.lineno <= frame.f_lineno <= _end(node)]
    return any(_is_number(node.body) or _is_number(node.orelse) for node in chosen)


def _end(node: ast.expr) -> int:
    return node.end_lineno or node.lineno


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


@kept
def _conditionals(filename: str) -> tuple[ast.IfExp, ...]:
    found = (node for node in nodes_of(tree_of(filename)) if isinstance(node, ast.IfExp))
    return tuple(node for node in found if any(_is_training(part) for part in ast.walk(node.test)))


def _is_training(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "training"


# -- what the example leaves open ----------------------------------------------------------------------------


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def unreached(model: nn.Module, names: Mapping[str, object], aliases: Mapping[str, str]) -> Iterator[Condition]:
    """Parameters that no run has read: nothing is known of them, and they stay whole."""
    missing = [name for name, _ in named_parameters(model) if name not in names and name not in aliases]
    if missing:
        yield Condition(f"parameters that the forward never reached stay whole: {listed(missing)}")
