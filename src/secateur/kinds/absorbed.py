"""Numbers that a cut changes and that made no difference: each hidden by something that came to the same.

`list(frames)[:width]`, `tokens // experts`, `deque(maxlen=10 * len(blocks))`: where the inputs that were tried are
short, original and cut model give the same, and on longer ones they do not. Both models run the same lines. So the
numbers that each line reckons with are written down in a run of the reference and in one of the cut model, wherever
they came from, and a line that was given another one, and gave the same, is named.
"""

from __future__ import annotations

import ast
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.model.place import short, users_line
from secateur.structure.ran import is_watched
from secateur.structure.read import kept
from secateur.structure.sides import position_of_code
from secateur.structure.source import source_of
from secateur.structure.worked_out import (
    NUMBERS,
    OPEN,
    SEQUENCES,
    UNKNOWN,
    Evaluator,
    Guard,
    Made,
    Names,
    absorbing,
    bare,
    guards_of,
    is_of_library,
    len_of,
    names_in,
)

Key = object  # of a value: plain, and comparable with that of another run
OTHER: Key = "something else"  # tensors and objects: the proof compares what comes of them
NONE: Key = "not known"
ALL: Key = "all there is"  # a bound that is as large as what it bounds
OFTEN = 40  # times that a line is looked at in one run
LONGEST = 60  # letters of an expression
# Functions of torch in which a number may be too large to matter: only beyond the sizes of what it is applied to ...
BEYOND = ("tril", "triu", "diagonal", "split", "chunk", "tensor_split", "tril_", "triu_")
# ... or whatever it is.
WINDOWS = ("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "unfold", "arange",
           "lp_pool1d", "lp_pool2d", "tril_indices", "triu_indices")  # fmt: skip
# The dimensions that a number counts along: the last ones, or those that an argument names (its name, its place, and
# what it is where it is left out).
LAST = tuple(("", 0, -n) for n in (1, 2, 3))
COUNTS_ALONG: dict[object, tuple[tuple[str, int, int], ...]] = {
    **dict.fromkeys(("tril", "triu", "tril_", "triu_"), LAST[:2]),
    **dict.fromkeys(("split", "chunk", "tensor_split"), (("dim", 2, 0),)),
    "diagonal": (("dim1", 2, 0), ("dim2", 3, 1)),
    **{f"{kind}_pool{n}d": LAST[:n] for kind in ("avg", "max", "lp") for n in (1, 2, 3)},
    Tensor.unfold: (("dimension", 1, 0),),
}


@dataclass(frozen=True)
class Taken:
    """What a line was given once, and what it gave.

    Args:
        given: the parts of the expression, or the numbers of the call.
        gave: what came of them; `NONE` where that cannot be told.
        sizes: of the tensor that a call was about; where a number counts along some of its dimensions, of those.
    """

    given: tuple[Key, ...]
    gave: Key
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spot:
    """An expression of the user's code, or a call of torch in a line of it.

    Args:
        where: "file:line".
        node: the expression, or the name of the function.
        kind: "bounds" (of slices of a tensor), "beyond", "window", or the class of the expression or of its operator.
        number: tells several slices of one call apart.
    """

    where: str
    node: ast.expr | str
    kind: str
    number: int = 0

    @property
    def text(self) -> str:
        """The expression as it may be printed."""
        text = self.node if isinstance(self.node, str) else ast.unparse(self.node)
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


# Line -> what is worked out when it runs, each with what has to hold for it to be reached.
Lines = Mapping[int, Mapping[ast.expr, tuple[Spot, tuple[Guard, ...]]]]


class Absorbed(TorchFunctionMode):
    """Writes down what the lines of a run are given and give, as far as that is plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Spot, dict[Taken, None]] = {}
        self.sliced: set[str] = set()  # lines that slice tensors: what those bounds do is seen there
        self._often: dict[tuple[int, int], int] = {}
        # By id, as asked at every call and every line: a piece of code is hashed anew each time, all of it.
        self._known: dict[int, tuple[CodeType, tuple[Names, Lines] | None]] = {}
        self._silent: set[ast.expr] = set()  # of tensors, or what only running it would tell: so it will be again

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the body runs."""
        before = sys.gettrace()
        with self:
            sys.settrace(self._enter)
            try:
                yield
            finally:
                sys.settrace(before)

    def _note(self, site: Spot, seen: Taken) -> None:
        known = self.seen.setdefault(site, {})
        if len(known) < OFTEN:
            known.setdefault(seen)

    # -- calls of torch ------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            self._slices(args[0], args[1])
        elif name in BEYOND or name in WINDOWS:
            self._number(func, args, kwargs, result)
        return result

    def _slices(self, tensor: Tensor, key: object) -> None:
        items = key if isinstance(key, tuple) else (key,)
        if not any(isinstance(item, slice) for item in items):
            return
        where = users_line()
        self.sliced.add(where)
        for n, (bounds, size) in enumerate(_bounds(items, _sizes(tensor))):
            self._note(Spot(where, "a slice of a tensor", "bounds", n), Taken(bounds, NONE, (size,)))

    def _number(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: object) -> None:
        name: str = func.__name__
        numbers = tuple(_whole((*args, *kwargs.values())))
        if numbers:
            sizes = next((_sizes(part) for part in (*args, *kwargs.values()) if isinstance(part, Tensor)), ())
            gave = tuple(_sizes(t) for t in (result if isinstance(result, (tuple, list)) else (result,)))
            along = COUNTS_ALONG.get(func, COUNTS_ALONG.get(name)) if sizes else None
            if along is not None:  # of dimensions that the cut may change beside them nothing is asked
                dims = list(_along(along, args, kwargs))
                sizes = tuple(sizes[d] for d in dims)
                gave = tuple(tuple(each[d] for d in dims) for each in gave) if name in WINDOWS else gave
            kind = "beyond" if name in BEYOND else "window"
            self._note(Spot(users_line(), name, kind), Taken(numbers, gave, sizes))

    # -- lines of the user's code --------------------------------------------------------------------------------

    def _enter(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        return None if self._lines_of(frame.f_code) is None else self._follow

    def _lines_of(self, code: CodeType) -> tuple[Names, Lines] | None:
        if id(code) not in self._known:
            self._known[id(code)] = code, _lines(code)
        return self._known[id(code)][1]

    def _follow(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        known = self._lines_of(frame.f_code) if event == "line" else None
        nodes = known[1].get(frame.f_lineno) if known is not None else None
        if nodes and known is not None:
            place = id(frame.f_code), frame.f_lineno
            self._often[place] = self._often.get(place, 0) + 1
            if self._often[place] <= OFTEN:
                self._work_out(Evaluator(known[0], frame), nodes)
        return self._follow

    def _work_out(self, reader: Evaluator, nodes: Mapping[ast.expr, tuple[Spot, tuple[Guard, ...]]]) -> None:
        for node, (site, guards) in nodes.items():
            if node in self._silent or not reader.reaches(guards):
                continue
            try:
                seen = _SEEN[type(node)](reader, node)
            except Exception:  # the code itself says so where it runs
                seen = None
            if seen is None:
                self._silent.add(node)
            else:
                self._note(site, seen)


def _sizes(tensor: object) -> tuple[int, ...]:
    if not isinstance(tensor, Tensor):
        return ()
    with torch._C.DisableTorchFunction():
        return tuple(tensor.shape)


def _along(known: Sequence[tuple[str, int, int]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[int]:
    """The dimensions that the numbers of such a call count along."""
    for word, place, usual in known:
        yield args[place] if word and place < len(args) else kwargs.get(word, usual)


def _bounds(items: Sequence[object], sizes: Sequence[int]) -> Iterator[tuple[tuple[Key, ...], int]]:
    """Start, end and step of each slice, and the size of the dimension that it is taken of."""
    d, given = 0, sum(1 for item in items if item is not None and item is not Ellipsis)
    for item in items:
        if item is Ellipsis:
            d += len(sizes) - given
        elif isinstance(item, slice):
            yield tuple(key_of(part) for part in (item.start, item.stop, item.step)), sizes[d]
            d += 1
        elif isinstance(item, Tensor) and item.dim() > 1 and item.dtype in (torch.bool, torch.uint8):
            d += item.dim()
        elif item is not None:
            d += 1


def _whole(values: Sequence[object]) -> Iterator[int]:
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            yield int.__int__(value)
        elif isinstance(value, (list, tuple)):
            yield from _whole(value)


@kept
def _lines(code: CodeType) -> tuple[Names, Lines] | None:
    """What is worth working out in a piece of code, by lines; None where it is nobody's model, or nothing is."""
    if not is_watched(code.co_filename):
        return None
    source, inside = source_of(code), position_of_code(code)
    if source is None or inside is None:
        return None
    lines: dict[int, dict[ast.expr, tuple[Spot, tuple[Guard, ...]]]] = {}
    for node in absorbing(source, code, inside):
        kind = type(node.op).__name__ if isinstance(node, ast.BinOp) else type(node).__name__
        site = Spot(f"{short(code.co_filename)}:{node.lineno}", node, kind)
        lines.setdefault(node.lineno, {})[node] = site, guards_of(source, node)
    return (names_in(source), lines) if lines else None


def key_of(value: Made) -> Key:
    """A value that two runs can be compared by."""
    if value is UNKNOWN:
        return NONE
    if isinstance(value, NUMBERS):
        return bare(value)
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, slice):
        return ("slice", key_of(value.start), key_of(value.stop), key_of(value.step))
    if isinstance(value, (list, tuple, range)):
        return (len(value), *(key_of(item) for item in value[:OFTEN]))
    return OTHER


def _of_parts(reader: Evaluator, node: ast.BinOp | ast.Compare) -> Taken | None:
    parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.left, *node.comparators]
    given = tuple(key_of(reader.value(part)) for part in parts)
    return None if OTHER in given or all(key == NONE for key in given) else Taken(given, key_of(reader.value(node)))


def _of_slice(reader: Evaluator, node: ast.Subscript) -> Taken | None:
    assert isinstance(node.slice, ast.Slice)
    base = reader.value(node.value)
    bounds = [reader.value(part) for part in (node.slice.lower, node.slice.upper, node.slice.step)]
    if isinstance(base, Tensor) or all(part is UNKNOWN or part is None for part in bounds):
        return None
    size = len_of(base)
    given = tuple(ALL if isinstance(size, int) and part == size else key_of(part) for part in bounds)
    if not isinstance(size, int) or NONE in given:
        return Taken(given, NONE)
    return Taken(given, slice(*(bare(part) for part in bounds)).indices(size))


def _of_call(reader: Evaluator, node: ast.Call) -> Taken | None:
    function = node.func
    base = reader.value(function.value) if isinstance(function, ast.Attribute) else UNKNOWN
    called = reader.value(function)
    if isinstance(base, (*SEQUENCES, deque)):
        name = function.attr if isinstance(function, ast.Attribute) else ""
    elif called is UNKNOWN or isinstance(called, str) or not is_of_library(called):
        return None
    else:
        name = getattr(called, "__name__", "")
    if name in OPEN:
        return None
    parts = [*node.args, *(keyword.value for keyword in node.keywords)]
    given = tuple(key_of(reader.value(part)) for part in parts)
    return Taken(given, key_of(reader.value(node)))


_SEEN: dict[type[ast.AST], Callable[[Evaluator, Any], Taken | None]] = {
    ast.BinOp: _of_parts, ast.Compare: _of_parts, ast.Subscript: _of_slice, ast.Call: _of_call,
}  # fmt: skip
