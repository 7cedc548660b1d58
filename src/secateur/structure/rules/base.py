"""The registry of rules and what a rule sees: one call with its arguments by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.structure.axes import ONE, Axis, leaves, lock, resolve
from secateur.structure.recorder import Recorder
from secateur.structure.trace import PLAIN, Args, Axes, Kwargs, Op, Restrict

Rule = Callable[["Call"], "Axes | list[Axes]"]
R = TypeVar("R", bound=Rule)
_RULES: dict[str, Rule] = {}
MOVED = frozenset(
    [
        "t",
        "transpose",
        "permute",
        "alias",
        "detach",
        "clone",
        "_to_copy",
        "unsqueeze",
        "squeeze",
        "expand",
        "view",
        "_unsafe_view",
    ]
)


# Python functions whose first tensor is data, even where it is a parameter (a learned token), and whose other one is
# the weight.
LAYERS = frozenset(["linear", "multi_head_attention_forward"])


CONVOLUTIONS = tuple(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))


def register(*names: str) -> Callable[[R], R]:
    """Register a rule for operators by base name ("mm" for all overloads of aten.mm; "mylib::op" otherwise).

    The rule takes a `Call` and returns the axes of the result, or a list with one entry per result tensor.
    """

    def add(rule: R) -> R:
        for name in names:
            _RULES[name] = rule
        _find.cache_clear()  # an operator that was met without its rule is asked for again
        return rule

    return add


@cache
def base_name(func: Op) -> str:
    """Operator name without overload and in-place underscore; with its namespace outside aten."""
    namespace, _, name = func._schema.name.partition("::")
    if name.endswith("_") and not name.startswith("__"):
        name = name[:-1]
    return str(name) if namespace == "aten" else f"{namespace}::{name}"


@cache
def _find(func: Op) -> Rule | None:
    rule = _RULES.get(base_name(func))
    if rule is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return rule


@cache
def _positions(func: Op) -> dict[str, int]:
    return {argument.name: i for i, argument in enumerate(func._schema.arguments)}


def known(func: Op) -> bool:
    """Whether an operator has a rule."""
    return _find(func) is not None


def by_parts(mode: TorchDispatchMode, func: Op, args: Args, kwargs: Kwargs) -> object:
    """What an operator without a rule gives that is made of others; NotImplemented where it is one call.

    Each part comes to the mode by itself. Every run that is laid beside a captured one is taken apart alike.
    """
    if known(func) or not func._can_decompose():
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


class Call:
    """One ATen call as a rule sees it."""

    def __init__(
        self,
        recorder: Recorder,
        func: Op,
        args: Args,
        kwargs: Kwargs,
        results: list[Tensor],
    ) -> None:
        self.recorder, self.func, self.args, self.kwargs, self.results = recorder, func, args, kwargs, results
        self.contracted: list[tuple[int, int, Axis]] = []
        # Of every factor of a product: whether it is a weight, its dimensions that stay, and those that are summed up.
        self.factors: list[tuple[bool, list[Axis], list[Axis]]] = []
        self.restricted: Restrict | None = None
        self.cost: list[Axes] = []
        self.positions: dict[int, list[Axis]] = {}

    def get(self, name: str, default: object = None) -> object:
        """Argument by name, wherever it was passed."""
        if name in self.kwargs:
            return self.kwargs[name]
        position = _positions(self.func).get(name, len(self.args))
        return self.args[position] if position < len(self.args) else default

    def integer(self, name: str, default: int = 0) -> int:
        """Argument that is an integer; the default stands for None, too."""
        found = self.get(name)
        return default if found is None else cast(int, found)

    def integers(self, name: str) -> list[int]:
        """Argument that is a list of integers, or one integer; none where it is left out."""
        found = self.get(name)
        return [found] if isinstance(found, int) else list(cast("Sequence[int]", found or ()))

    def tensor(self, name: str) -> Tensor:
        """Argument that is a tensor."""
        return cast(Tensor, self.get(name))

    def optional(self, name: str) -> Tensor | None:
        """Argument that is a tensor or None."""
        return cast("Tensor | None", self.get(name))

    def listed(self, name: str) -> list[Tensor]:
        """Argument that is a list of tensors."""
        return list(cast(Sequence[Tensor], self.get(name)))

    def operand(self, position: int) -> Tensor:
        """The tensor at a position of the arguments."""
        return cast(Tensor, self.args[position])

    @property
    def first(self) -> Tensor:
        """The tensor that the operator is applied to."""
        return cast(Tensor, self.args[0])

    def position(self, name: str) -> int:
        """Position of an argument in the schema."""
        return _positions(self.func)[name]

    def axes(self, tensor: Tensor) -> Axes:
        """Dimensions of a tensor."""
        return self.recorder.axes(tensor)

    def number(self, tensor: Tensor) -> int:
        """Number of a tensor."""
        return self.recorder.number(tensor)

    def tensors(self) -> list[Tensor]:
        """Tensor arguments in order."""
        found = [a for a in (*self.args, *self.kwargs.values()) if type(a) not in PLAIN]
        listed = (a if isinstance(a, (list, tuple)) else (a,) for a in found)
        return [t for items in listed for t in items if type(t) not in PLAIN and isinstance(t, Tensor)]

    def unify(self, a: Axis, b: Axis) -> None:
        """Two dimensions are indexed alike."""
        self.recorder.unify(a, b)

    def fresh(self, size: int, why: str = "") -> Axis:
        """A new dimension, locked if a reason is given."""
        return self.recorder.space.fresh(size, self.recorder.reason(why) if why else None)

    def lock(self, axis: Axis, why: str, hint: str = "") -> None:
        """Forbid cuts of a dimension."""
        if resolve(axis) is not ONE:
            lock(axis, self.recorder.reason(why, hint))

    def contract(self, tensor: Tensor, *dims: int) -> None:
        """Note that the call sums over dimensions of `tensor`; tells producers from consumers."""
        axes, number = self.axes(tensor), self.number(tensor)
        summed = {d % tensor.dim() for d in dims}
        weight = self._is_weight(tensor, number)
        if weight:
            self.recorder.trace.widths.extend(axes)
        self.factors.append((weight, [a for d, a in enumerate(axes) if d not in summed], [axes[d] for d in summed]))
        self.contracted += [(number, d, axes[d]) for d in sorted(summed)]
        name, where = self.recorder.sources.get(number, ("", ()))
        for d, original in enumerate(where):
            if original >= 0:
                role = "in" if d in summed else "out"
                self.recorder.trace.roles.setdefault((name, original), role)

    def _is_weight(self, tensor: Tensor, number: int) -> bool:
        """Whether a factor of a product is a weight: made of parameters, and not what a layer is applied to."""
        if tensor is self.get("weight"):  # of a convolution, say: also where a network has computed it
            return number not in self.recorder.trace.names or number in self.recorder.weights
        if number not in self.recorder.weights:
            return False
        return self.recorder.here.function not in LAYERS or tensor is self.tensors()[-1]

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether a tensor is not a (moved) parameter."""
        return self.number(tensor) not in self.recorder.sources


def apply(call: Call) -> list[Axes]:
    """Axes of every result of the call, by its rule or as a barrier."""
    _lock_used_positions(call)
    rule = _find(call.func)
    if not call.results:
        if rule is None or base_name(call.func) == "equal":  # one truth value of all elements
            _lock_all(call, f"the values of {base_name(call.func)} leave the graph here")
        return []
    if rule is None:
        _lock_all(call, f"no rule for the operator {base_name(call.func)}")
        why = f"made by {base_name(call.func)}, which has no rule"
        return [tuple(call.fresh(n, why) for n in t.shape) for t in call.results]
    axes = rule(call)
    _note_rows(call)
    found = axes if isinstance(axes, list) else [axes] * len(call.results)
    _lock_own_chance(call, found)
    return found


def _lock_own_chance(call: Call, axes: Sequence[Axes]) -> None:
    """Numbers from a generator of the code's own are a table by another name: at another size it holds others."""
    if any(isinstance(value, torch.Generator) for value in (*call.args, *call.kwargs.values())):
        for axis in (axis for one in axes for axis in one):
            call.lock(axis, "numbers from a generator of the code's own are others at another size")


def _note_rows(call: Call) -> None:
    """A weight is applied to every position of what it does not share with the other factor."""
    if not any(weight for weight, _, _ in call.factors):
        return
    trace = call.recorder.trace
    own = {atom.id for weight, stays, _ in call.factors if weight for axis in stays for atom in leaves(axis)}
    for weight, stays, summed in call.factors:
        trace.summed.extend(summed)
        if weight and call.recorder.here.function in (*LAYERS, *CONVOLUTIONS):
            trace.made.extend(stays)
            trace.consumed.extend(summed)
        if not weight:
            trace.rows.extend(atom for axis in stays for atom in leaves(axis) if atom.id not in own)


def _lock_used_positions(call: Call) -> None:
    """Positions (of a maximum, say) are numbers that a cut would change: harmless until somebody reads them."""
    known = call.recorder.positions
    for tensor in call.tensors() if known else ():
        for axis in known.get(call.number(tensor), ()):
            call.lock(axis, "positions of this dimension are read as numbers")


def _lock_all(call: Call, why: str) -> None:
    hint = "register a rule with secateur.structure.rules.register"
    for tensor in call.tensors():
        for axis in call.axes(tensor):
            call.lock(axis, why, hint)


def broadcast(call: Call, shapes: Sequence[Axes]) -> Axes:
    """Unify dimensions that a broadcast lines up (from the right); size one repeats."""
    out: list[Axis] = []
    for back in range(1, max(map(len, shapes), default=0) + 1):
        here = [axes[-back] for axes in shapes if len(axes) >= back]
        wide = [axis for axis in here if axis.size != 1]
        for other in wide[1:]:
            call.unify(wide[0], other)
        out.append(resolve(wide[0]) if wide else ONE)
    return tuple(reversed(out))


def pointwise(call: Call) -> Axes | list[Axes]:
    """Every element depends on the elements at the same place of the operands."""
    out = broadcast(call, [call.axes(t) for t in call.tensors()])
    if all(t.dim() == len(out) for t in call.results):
        return out
    return [out if t.dim() == len(out) else tuple(call.fresh(n, "bookkeeping") for n in t.shape) for t in call.results]


register(
    "copy", "fill", "zero", "clone", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous",
    "native_dropout", "dropout", "bernoulli", "masked_fill", "uniform", "normal", "zeros_like",
    "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "_prelu_kernel", "rrelu_with_noise",
    "_conj", "_neg_view", "clamp", "where", "nan_to_num", "real", "imag", "polar", "complex", "isnan", "isinf",
    "hardswish", "log_sigmoid_forward", "floor_divide",
    "lerp", "addcmul", "addcdiv", "exponential", "rrelu", "relu", "relu6", "hardtanh",
)(pointwise)  # fmt: skip


def follow_source(call: Call, produced: list[int]) -> None:
    """A moved parameter is still that parameter: remember which of its dimensions went where."""
    for result, axes in call.positions.items():
        call.recorder.positions[produced[result]] = axes
    if base_name(call.func) not in MOVED or not call.args or not produced:
        return
    source = call.recorder.sources.get(call.number(call.first))
    if source is None or produced[0] in call.recorder.sources:
        return
    name, dims = source
    before = call.axes(call.first)
    after = call.recorder.trace.axes[produced[0]]
    places = {id(resolve(axis)): dims[i] for i, axis in enumerate(before) if axis.size > 1}
    moved = tuple(places.get(id(resolve(axis)), -1) for axis in after)
    if any(d >= 0 for d in moved):
        call.recorder.sources[produced[0]] = (name, moved)


def follow_weights(call: Call, numbers: Collection[int], produced: list[int]) -> None:
    """What is made of parameters alone is a weight like them, unless a layer was applied to it.

    Args:
        call: the call, of which nothing depends on the input of the model.
        numbers: of its tensor arguments.
        produced: of its results.
    """
    recorder, names = call.recorder, call.recorder.trace.names
    if call.restricted is not None or recorder.weights.isdisjoint(numbers):
        return
    if recorder.here.function in LAYERS and base_name(call.func) not in MOVED:
        return
    if all(n in recorder.weights or n in names or n in recorder.trace.constants for n in numbers):
        recorder.weights.update(produced)
