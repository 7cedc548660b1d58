"""Dimensions, amounts and bounds of an operator that a plain number of the code chooses, and what chooses it.

`h.flip(n)` turns the rows or the units, whichever `n` says, and `pad(h, (n, 0))` shifts the units where `n` is no
longer zero. A literal and an attribute of a module say the same in every run. A number of tensors in a list, a count
of calls, the number of dimensions, whether a tensor is contiguous: of these the example shows one value.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from secateur.structure.axes import leaves
from secateur.structure.expressions import attributes_in, dims_in
from secateur.structure.numbers import TrackedInt
from secateur.structure.read import kept
from secateur.structure.recorder import Recorder
from secateur.structure.settled import call_at, counted, is_settled
from secateur.structure.trace import Args, Chosen, Kwargs, tensors_of
from secateur.structure.value_uses import FACTORS, MADE, VALUES
from secateur.types import Condition

# What these make of a number is the same number for every unit, or the size of a dimension, which is watched.
SIZED = ("view", "reshape", "expand", "broadcast_to", "zeros", "ones", "empty", "rand", "randn", "new_zeros",
         "new_ones", "new_empty", "new")  # fmt: skip
SAME = frozenset(
    [*VALUES, *FACTORS, *MADE, *SIZED, "dropout", "softplus", "to", "type", "manual_seed", "__setitem__", "item"]
)
LONGEST = 60  # letters of an expression


def watch_choices(recorder: Recorder, func: Callable[..., object], args: Args, kwargs: Kwargs) -> None:
    """Note the numbers of a call of the user's code that another run may bring otherwise."""
    name = getattr(func, "__name__", "")
    if name.strip("_") in SAME or name in SAME:
        return
    frame = recorder.here.caller(getattr(func, "__code__", None))
    node = None if frame is None else call_at(frame)
    if frame is None or node is None:
        return
    for part in _open_parts(node):
        value = _value_of(node, part, args, kwargs)
        if isinstance(value, Tensor):
            continue
        numbers = list(_whole(value))
        plain = [n for n in numbers if not isinstance(n, TrackedInt)]
        if any(_is_open(recorder, n) for n in numbers) or (plain and not is_settled(part, frame)):
            _note(recorder, node, part, [int.__int__(n) for n in numbers], (args, kwargs))


def _is_open(recorder: Recorder, number: int) -> bool:
    """Whether a number that is followed comes of what a tensor is, or of an attribute that methods count on."""
    if not isinstance(number, TrackedInt):
        return False
    if any(leaf.id in recorder.watch.ranks for axis in dims_in(number.expr) for leaf in leaves(axis)):
        return True
    owners = ((recorder.modules.get(each.owner), each.name) for each in attributes_in(number.expr))
    return any(owner is not None and name in counted(type(owner)) for owner, name in owners)


def _note(recorder: Recorder, node: ast.expr, part: ast.expr, value: Sequence[int], given: object) -> None:
    tensors = tensors_of(given)
    if not tensors:
        return
    place = recorder.here.place()
    text = f"holds where `{_short(part)}` gives {', '.join(map(str, value))}, which chooses what `{_short(node)}` does"
    axes = [axis for tensor in tensors for axis in recorder.axes(tensor)]
    recorder.trace.chosen.append(Chosen(Condition(text, place.where, place.module), axes))


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


@kept
def _open_parts(node: ast.Call | ast.Subscript) -> tuple[ast.expr, ...]:
    """Arguments of a call, and bounds of slices, that are no literals."""
    if isinstance(node, ast.Call):
        parts = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg not in ("dtype", "device"))]
    else:
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        parts = [p for s in items if isinstance(s, ast.Slice) for p in (s.lower, s.upper, s.step) if p is not None]
    return tuple(part for part in parts if not _is_literal(part))


def _is_literal(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_literal(node.operand)
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(map(_is_literal, node.elts))
    return isinstance(node, ast.Constant)


def _value_of(node: ast.Call | ast.Subscript, part: ast.expr, args: Args, kwargs: Kwargs) -> object:
    """What an argument was; all numbers of the call where that cannot be told."""
    if isinstance(node, ast.Subscript):
        return args[1:]
    for keyword in node.keywords:
        if keyword.value is part and keyword.arg is not None:
            return kwargs.get(keyword.arg)
    if part in node.args and not any(isinstance(each, ast.Starred) for each in node.args):
        place = node.args.index(part) + len(args) - len(node.args)  # a method has its tensor in front
        return args[place] if 0 <= place < len(args) else None
    return (*args, *kwargs.values())


def _whole(value: object) -> Iterator[int]:
    if isinstance(value, slice):
        yield from _whole((value.start, value.stop, value.step))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _whole(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def chosen(found: Sequence[Chosen], cut: Collection[int]) -> Iterator[Condition]:
    """Conditions of those whose tensors lose units, each line once.

    Args:
        found: of all runs.
        cut: ids of atoms that lose units.
    """
    said: set[str] = set()
    for each in found:
        condition = each.condition
        if condition.where not in said and any(leaf.id in cut for axis in each.axes for leaf in leaves(axis)):
            said.add(condition.where)
            yield condition
