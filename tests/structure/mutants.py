"""Systematic corruptions of operator rules: one at a time, each doing what a wrong rule would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from secateur.structure.axes import Atom, Axis, Prod, Sum, depends_on, resolve
from secateur.structure.rules import base
from secateur.structure.trace import Axes

Mutation = Callable[[Callable[..., Any], base.Call, "Mutant"], Any]


@dataclass
class Mutant:
    """One rule with one corruption; `hits` counts how often it really changed something."""

    rule: str
    kind: str
    hits: int = 0
    models: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.rule}:{self.kind}"


def _drop_unify(number: int) -> Mutation:
    def mutate(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
        genuine, seen = call.unify, [0]

        def unify(a: Axis, b: Axis) -> None:
            if resolve(a) is resolve(b) or a.size == 1:
                return
            seen[0] += 1
            if seen[0] == number:
                mutant.hits += 1
            else:
                genuine(a, b)

        call.unify = unify  # type: ignore[method-assign]
        return rule(call)

    return mutate


def _no_locks(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    genuine = call.fresh

    def fresh(size: int, why: str = "") -> Axis:
        mutant.hits += bool(why) and size > 1
        return genuine(size)

    def lock(axis: Axis, why: str, hint: str = "") -> None:
        mutant.hits += bool(depends_on(axis))

    call.lock, call.fresh = lock, fresh  # type: ignore[method-assign]
    return rule(call)


def _no_contraction(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    axes = rule(call)
    mutant.hits += bool(call.contracted)
    call.contracted = []
    return axes


def _no_restriction(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    axes = rule(call)
    mutant.hits += call.restricted is not None
    call.restricted = None
    return axes


def _results(call: base.Call, axes: Any) -> list[Axes]:
    return list(axes) if isinstance(axes, list) else [axes] * len(call.results)


def _reversed_parts(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    """The order of a product or of a concatenation is turned round."""

    def turn(axis: Axis) -> Axis:
        node = resolve(axis)
        if isinstance(node, Atom) or len(node.parts) < 2:
            return axis
        mutant.hits += 1
        return type(node)(node.parts[::-1])

    before = {id(resolve(a)) for t in call.tensors() for a in call.axes(t)}
    found = _results(call, rule(call))
    return [tuple(axis if id(resolve(axis)) in before else turn(axis) for axis in axes) for axes in found]


def _swapped(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    """Two dimensions of the result with equal sizes take each other's place."""
    out = []
    for axes in _results(call, rule(call)):
        changed = list(axes)
        pairs = [(i, j) for i in range(len(axes)) for j in range(i) if axes[i].size == axes[j].size > 1]
        for i, j in pairs[:1]:
            if resolve(axes[i]) is not resolve(axes[j]):
                changed[i], changed[j] = changed[j], changed[i]
                mutant.hits += 1
        out.append(tuple(changed))
    return out


def _forgotten(last: bool) -> Mutation:
    """A dimension of the result loses what it was (as if it were made anew): the last one, or the second."""

    def mutate(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
        out = []
        for axes in _results(call, rule(call)):
            changed = list(axes)
            d = len(axes) - 1 if last else 1
            if (last or len(axes) > 2) and 0 <= d < len(axes) and depends_on(axes[d]):
                changed[d] = call.recorder.space.fresh(axes[d].size)
                mutant.hits += 1
            out.append(tuple(changed))
        return out

    return mutate


def _shifted_sum(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    """The first two terms of a concatenation are taken for each other where that leaves the size."""
    out = []
    for axes in _results(call, rule(call)):
        changed = list(axes)
        for d, axis in enumerate(axes):
            node = resolve(axis)
            if isinstance(node, Sum) and len(node.parts) > 1:
                changed[d] = Sum((*node.parts[1:], node.parts[0]))
                mutant.hits += 1
        out.append(tuple(changed))
    return out


def _flattened_product(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    """Column-major instead of row-major."""
    out = []
    for axes in _results(call, rule(call)):
        changed = list(axes)
        for d, axis in enumerate(axes):
            node = resolve(axis)
            if isinstance(node, Prod) and len(node.parts) > 1:
                changed[d] = Prod(node.parts[::-1])
                mutant.hits += 1
        out.append(tuple(changed))
    return out


def _handed_on(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    """The result is taken for its first operand, dimension by dimension; nothing is tied or locked."""
    before = call.axes(call.tensors()[0]) if call.tensors() else ()
    out = []
    for t in call.results:
        aligned = before if len(before) == t.dim() else (call.recorder.space.fresh(0),) * t.dim()
        pairs = zip(t.shape, aligned, strict=True)
        out.append(tuple(axis if axis.size == n else call.recorder.space.fresh(n) for n, axis in pairs))
    mutant.hits += 1
    return out


def _as_pointwise(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    """Operands are tied from the right, as if the operator worked element by element."""
    if not call.tensors() or any(t.shape != call.results[0].shape for t in call.results):
        return rule(call)
    axes = base.broadcast(call, [call.axes(t) for t in call.tensors()])
    if [axis.size for axis in axes] != list(call.results[0].shape):
        return rule(call)
    mutant.hits += 1
    return [axes] * len(call.results)


def _operands_free(rule: Callable[..., Any], call: base.Call, mutant: Mutant) -> Any:
    """The operands are not locked, the results are."""
    locked = call.lock
    call.lock = lambda axis, why, hint="": None  # type: ignore[method-assign]
    found = _results(call, rule(call))
    call.lock = locked  # type: ignore[method-assign]
    mutant.hits += 1
    return found


RULES_OWN: dict[str, Mutation] = {
    "hands its operand on": _handed_on,
    "as if element by element": _as_pointwise,
    "locks no operand": _operands_free,
}
MUTATIONS: dict[str, Mutation] = {
    "drops unify 1": _drop_unify(1),
    "drops unify 2": _drop_unify(2),
    "drops unify 3": _drop_unify(3),
    "locks nothing": _no_locks,
    "forgets the contraction": _no_contraction,
    "forgets the restriction": _no_restriction,
    "reverses new parts": _reversed_parts,
    "swaps dimensions": _swapped,
    "forgets the last dimension": _forgotten(last=True),
    "forgets the second dimension": _forgotten(last=False),
    "rotates the sum": _shifted_sum,
    "column-major product": _flattened_product,
}


def rule_of(func: Any) -> Callable[..., Any] | None:
    """The rule of an operator."""
    return base._find(func)


@contextmanager
def corrupted(mutant: Mutant) -> Iterator[None]:
    """The registry with one corrupted rule; restored afterwards."""
    mutation = {**MUTATIONS, **RULES_OWN}[mutant.kind]
    genuine = base._find

    def find(func: Any) -> Callable[..., Any] | None:
        rule = genuine(func)
        if rule is None or rule.__name__ != mutant.rule:
            return rule
        return lambda call: mutation(rule, call, mutant)

    base._find = find  # type: ignore[assignment]
    try:
        yield
    finally:
        base._find = genuine
