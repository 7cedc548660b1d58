"""Look at activations of further batches at the places that a trace knows: what consumers read, what ReLUs give.

A trace says which call contracts which tensor over which dimension. The same calls come in the same order when
the model runs again, so counting the calls of the operators concerned finds the tensors; nothing is hooked and
nothing is copied. Batch and spatial sizes may differ from those of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import UnsupportedError
from secateur.model.call import call
from secateur.structure import rules
from secateur.structure.axes import Atom, Axis, leaves, unit_index
from secateur.structure.capture import quiet
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Args, Kwargs, Op, Ref, Step, Trace, numbers_in, tensors_of
from secateur.types import Example, Group

_MOVES = frozenset(["t", "transpose", "permute", "alias", "detach", "clone", "_to_copy", "view", "_unsafe_view",
                    "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "chunk", "unbind",
                    "expand", "numpy_T", "unflatten"])  # fmt: skip
_COPIES = frozenset(["clone", "_to_copy"])  # of these moves: the others give views, which share memory
Receive = Callable[["Site", Tensor], None]


@dataclass(frozen=True, eq=False)
class Site:
    """One tensor of the run that is handed out.

    Args:
        step: number of the call in the trace.
        tensor: number of the tensor in the trace.
        dim: its dimension of interest.
        result: whether it is what the call returns, rather than what it reads.
        group: name of the group whose units lie along `dim` ("" for sites that are asked for by weight).
        unit: int64 [size of dim], unit at every position, -1 for none.
        weight: name of the parameter that it is contracted with, "" where there is none.
    """

    step: int
    tensor: int
    dim: int
    result: bool = False
    group: str = ""
    unit: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    weight: str = ""


class Flow:
    """Questions about the flow of data through a trace.

    Args:
        trace: the trace.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.made: dict[int, Step] = {}
        self.activations = set(trace.inputs)
        for step in trace.steps:
            # What is computed from weights alone (a normalised weight) is no activation, however many calls it takes.
            depends = any(n in self.activations for n in self.read(step))
            for number in step.outputs:
                self.made.setdefault(
                    number, step
                )  # in-place calls return a tensor that exists already: its first maker counts
                if depends:
                    self.activations.add(number)

    @staticmethod
    def read(step: Step) -> list[int]:
        """Numbers of the tensors that a call reads."""
        return [*numbers_in(step.args), *numbers_in(step.kwargs)]

    def source(self, number: int) -> tuple[str, list[tuple[Step, int]]]:
        """The parameter or buffer that a tensor is a view or copy of; calls and positions of their results."""
        chain: list[tuple[Step, int]] = []
        # Back through calls that move data and compute nothing, up to the parameter itself.
        while number not in self.trace.names:
            step = self.made.get(number)
            if step is None or base_name(step.func) not in _MOVES or number in self.activations:
                return "", []
            chain.append((step, step.outputs.index(number)))
            moved = step.args[0]
            assert isinstance(moved, Ref)  # what moves data takes the tensor first
            number = moved.number
        return self.trace.names[number], chain[::-1]

    def views(self, step: Step) -> dict[int, tuple[str, list[tuple[Step, int]]]]:
        """Operands of a call that are a parameter or a view of it, each with what `source` says of it."""
        found = {number: self.source(number) for number in self.read(step) if number not in self.activations}
        return {
            number: (name, chain)
            for number, (name, chain) in found.items()
            if name and not any(base_name(call.func) in _COPIES for call, _ in chain)
        }

    @staticmethod
    def moves(step: Step) -> bool:
        """Whether a call only moves data."""
        return base_name(step.func) in _MOVES

    def weight(self, step: Step) -> str:
        """Name of the parameter that a call contracts with an activation, "" if there is none."""
        for number, *_ in step.contracted:
            name = "" if number in self.activations else self.source(number)[0]
            if name:
                return name
        return ""


def atoms_of(trace: Trace, group: Group) -> list[tuple[Atom, Tensor]]:
    """Atoms that hold the units of a group, each with the unit of every index (-1 = none).

    Args:
        trace: a trace of the group's model.
        group: units whose spans vary along one dimension.
    """
    numbers = {name: number for number, name in trace.names.items()}
    found: dict[int, tuple[Atom, Tensor]] = {}
    for span in group.spans:
        if span.index is None or span.tensor not in numbers:
            continue
        axes = trace.axes[numbers[span.tensor]]
        dims = [d for d, size in enumerate(span.index.shape) if size != 1] or [0]
        if len(dims) == 1:
            # The units are those of an earlier trace; the index says which atom of this one they lie along.
            match = _match(axes[dims[0]], span.index.flatten().cpu())
            if match is not None:
                found.setdefault(match[0].id, match)
    return list(found.values())


def _match(axis: Axis, index: Tensor) -> tuple[Atom, Tensor] | None:
    """The atom along whose indices the units of `index` lie: every index belongs to one unit."""
    best: tuple[Atom, Tensor] | None = None
    for atom in {a.id: a for a in leaves(axis)}.values():
        for places in unit_index(axis, atom):
            at = torch.from_numpy(places)
            index_here = index.expand(len(at)) if len(index) == 1 else index
            used = (at >= 0) & (index_here >= 0)
            unit = torch.full((atom.size,), -1)
            # Read the units off the places, and see below whether every place has the unit that it should have.
            unit[at[used]] = index_here[used]
            again = torch.where(at >= 0, unit[at.clamp(min=0)], -1)
            # Several atoms may fit, one of them being a product: the smallest is the one that can be cut.
            finest = best is None or int((unit >= 0).sum()) < int((best[1] >= 0).sum())
            if bool(used.any()) and torch.equal(again, index_here) and finest:
                best = (atom, unit)
    return best


def consumer_sites(trace: Trace, groups: Iterable[Group]) -> list[Site]:
    """What the consumers of every group read: contracted activations whose sum runs over the units.

    A tensor that several calls read is listed once per call; `distinct` keeps one of each.

    Raises:
        UnsupportedError: no call sums over the units of a group; names it.
    """
    flow, sites = Flow(trace), []
    for group in groups:
        found = [
            Site(i, number, d, group=group.name, unit=unit, weight=flow.weight(step))
            for atom, index in atoms_of(trace, group)
            for i, step in enumerate(trace.steps)
            for number, d, axis in step.contracted
            if number in flow.activations and _sums_over(step, number, atom)
            for unit in _units(axis, atom, index)
        ]
        if not found:
            raise UnsupportedError(
                f"no call of the model sums over the units of group {group.name!r}",
                hint="protect the group, or choose a criterion that looks at weights",
            )
        sites += found
    return sites


def _sums_over(step: Step, number: int, atom: Atom) -> bool:
    """Whether both sides of the product have the atom; in a depthwise convolution only the activation has."""
    return any(atom.id in {leaf.id for leaf in leaves(axis)} for other, _, axis in step.contracted if other != number)


def _units(axis: Axis, atom: Atom, index: Tensor) -> list[Tensor]:
    found = []
    for places in unit_index(axis, atom):
        at = torch.from_numpy(places)
        unit = torch.where(at >= 0, index[at.clamp(min=0)], -1)
        if bool((unit >= 0).any()):
            found.append(unit)
    return found


def result_sites(trace: Trace, groups: Iterable[Group], chosen: Callable[[Step], bool]) -> list[Site]:
    """What chosen calls return, wherever it has the units of a group along some dimension.

    Args:
        trace: a whole trace.
        groups: the groups.
        chosen: which calls.
    """
    steps = [(i, step) for i, step in enumerate(trace.steps) if step.outputs and chosen(step)]
    return [
        Site(i, step.outputs[0], d, result=True, group=group.name, unit=unit)
        for group in groups
        for atom, index in atoms_of(trace, group)
        for i, step in steps
        for d, axis in enumerate(trace.axes[step.outputs[0]])
        for unit in _units(axis, atom, index)
    ]


def weight_sites(trace: Trace, names: Iterable[str]) -> list[Site]:
    """The activation that each weight is contracted with, for every use of the weight.

    Args:
        trace: a trace.
        names: parameters; those that are never contracted with an activation have no site.
    """
    flow, wanted = Flow(trace), set(names)
    return [
        Site(i, number, d, weight=name)
        for i, step in enumerate(trace.steps)
        if step.contracted and (name := flow.weight(step)) in wanted
        for number, d, _ in step.contracted
        if number in flow.activations
    ]


def distinct(trace: Trace, sites: Iterable[Site]) -> list[Site]:
    """Sites without those that read the same values again (three projections read one tensor)."""
    kept: dict[tuple[object, ...], Site] = {}
    for site in sites:
        # An in-place call in between makes other values of the same tensor.
        writers = [i for i in range(site.step) if site.tensor in trace.steps[i].outputs]
        version = site.step if site.result else (writers[-1] if writers else -1)
        kept.setdefault((site.group, site.tensor, site.dim, version, tuple(site.unit.tolist())), site)
    return list(kept.values())


class _Stop(BaseException):
    """Everything that was asked for has been seen; no `except Exception` on the way may catch it."""


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the model on further batches and hands out the tensors at the sites.

    Args:
        model: the captured model, or one that was cut from it: the calls are the same.
        trace: the trace that the sites belong to.
        sites: what to hand out.
        last: leave the forward after the last site.
        also: operators that are watched beside those of the sites.

    Cost: a forward pass plus about 10 microseconds per call.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        sites: Sequence[Site],
        *,
        last: bool = False,
        also: Collection[Op] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._trace, self._last = model, trace, last
        # Without those of other types: a sharded parameter is put together anew for every forward.
        named = model.named_parameters(remove_duplicate=False)
        self._own = {name: p for name, p in named if type(p) is nn.Parameter}
        watched = {trace.steps[site.step].func for site in sites} | set(also)
        # Only calls of these operators are counted: the others may differ, as long as these come in this order.
        self._expected = [i for i, step in enumerate(trace.steps) if step.func in watched]
        self._watched = watched
        self._sites: dict[int, list[Site]] = {}
        for site in sites:
            self._sites.setdefault(site.step, []).append(site)
        flow = Flow(trace)
        self._weights = {number: flow.views(trace.steps[number]) for number in self._sites}
        self._end = max(self._sites, default=-1)
        self._seen = 0
        self._receive: Receive = lambda site, value: None

    def run(self, example: Example, receive: Receive) -> None:
        """One forward pass.

        Args:
            example: what the model is called with.
            receive: called with every site and its tensor, which must not be changed or kept.

        Raises:
            UnsupportedError: the model makes other calls than on the example of the trace.
            ForwardError: the forward fails.
        """
        self._seen, self._receive = 0, receive
        with quiet(self._model, copies=False):  # once per batch: values are kept by the guard around all of them
            try:
                with self:
                    call(self._model, example)
            # The guard has put back the modes by then, as for every other way out.
            except _Stop:
                return
        if self._seen != len(self._expected):
            self._differs(f"it makes {self._seen} of {len(self._expected)} calls of the operators that are watched")

    def __torch_dispatch__(self, func: Op, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        """Count the call and hand out what is asked for."""
        kwargs = kwargs or {}
        # As at capture: the same calls are seen only if the same composites are taken apart.
        result = rules.by_parts(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        if func not in self._watched:
            return func(*args, **kwargs)
        number = self._expected[self._seen] if self._seen < len(self._expected) else -1
        if number < 0 or self._trace.steps[number].func is not func:
            wanted = str(self._trace.steps[number].func) if number >= 0 else "no further call"
            self._differs(f"call {self._seen} is {func}, expected was {wanted}")
        # Operands before the call, which may write into them; results after it.
        self._seen += 1
        sites = self._sites.get(number, [])
        step = self._trace.steps[number]
        if sites:
            self._require_weights(number, args, kwargs)
        for site in sites:
            if not site.result:
                self._hand_out(site, _operand(step, site.tensor, args, kwargs))
        result = func(*args, **kwargs)
        for site in sites:
            if site.result:
                self._hand_out(site, tensors_of(result)[step.outputs.index(site.tensor)])
        if self._last and number == self._end:
            raise _Stop
        return result

    def _require_weights(self, number: int, args: Args, kwargs: Kwargs) -> None:
        """Refuse the same operator in the same place of the order with the weight of another layer or expert."""
        step = self._trace.steps[number]
        for operand, (name, chain) in self._weights[number].items():
            own, value = self._own.get(name), _operand(step, operand, args, kwargs)
            if own is None:  # a buffer may be made anew by every forward
                continue
            # By memory: tied weights go by any of their names, and of a stack each expert is a view of its own.
            view = own.detach()
            for call_, position in chain:
                view = tensors_of(call_.func(view, *call_.args[1:], **call_.kwargs))[position]
            if value.data_ptr() != view.data_ptr():
                self._differs(f"{step.place.op} multiplies with another tensor than {name!r}")

    def _hand_out(self, site: Site, value: Tensor) -> None:
        # The same operator in the same place of the order, but with another operand.
        if value.dim() <= site.dim or (len(site.unit) and value.shape[site.dim] != len(site.unit)):
            place = self._trace.steps[site.step].place
            self._differs(f"{place.op} in {place.module!r} reads a tensor of shape {tuple(value.shape)}")
        self._receive(site, value.detach())  # whoever keeps it must not keep the graph

    def _differs(self, why: str) -> None:
        raise UnsupportedError(
            f"{type(self._model).__name__} does other things with this batch than with the example",
            why=why,
            hint="give batches of the same form as the example; a forward that branches on its data is not followed",
        )


def _operand(step: Step, number: int, args: Args, kwargs: Kwargs) -> Tensor:
    for recorded, value in zip(step.args, args, strict=False):
        # By position first: an operand that is there twice is the same tensor.
        if isinstance(recorded, Ref) and recorded.number == number and isinstance(value, Tensor):
            return value
    for name, recorded in step.kwargs.items():
        value = kwargs.get(name)
        if isinstance(recorded, Ref) and recorded.number == number and isinstance(value, Tensor):
            return value
    raise UnsupportedError(f"{step.place.op} takes its operands in another order than on the example")


def argument(step: Step, name: str, default: object = None) -> Any:
    """Argument of a recorded call by the name in the operator's schema."""
    if name in step.kwargs:
        return step.kwargs[name]
    names = [a.name for a in step.func._schema.arguments]
    position = names.index(name) if name in names else len(step.args)
    return step.args[position] if position < len(step.args) else default
