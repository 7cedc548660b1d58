"""Explicit gates: a trainable factor z per unit, inserted anywhere and folded away exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.model.carried import own_class
from secateur.registry import listed, one_of, suggestion
from secateur.types import Group, Span


class Gate(nn.Module):
    """Multiplies the slices of a weight by the factors of the units that own them.

    Args:
        group: name of the group.
        z: one factor per unit; the same parameter in all gates of a group.
        index: unit of every element, as in a `Span`; None for single weights.
        order: names of the layer's parameters in their order, to be restored when the gate leaves.
    """

    index: Tensor | None

    def __init__(self, group: str, z: nn.Parameter, index: Tensor | None, order: tuple[str, ...]) -> None:
        super().__init__()
        self.group, self.z, self.order = group, z, order
        self.register_buffer("index", index, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The gated weight."""
        if self.index is None:
            return weight * self.z.view(weight.shape).to(weight.dtype)
        factors = torch.cat([self.z.flatten(), self.z.new_ones(1)])  # -1, no unit, reads the one at the end
        return weight * factors[self.index].to(weight.dtype)


class Gates:
    """The gates of a model.

    Args:
        model: a model into which `insert_gates` has put gates.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def values(self) -> dict[str, nn.Parameter]:
        """Group name -> z of the group's shape; these are what an optimiser or a penalty takes."""
        return {gate.group: gate.z for _, _, gate in self._found()}

    def spans(self, group: Group) -> tuple[Span, ...]:
        """Those spans of a group that are gated."""
        gated = {f"{path}.{key}".lstrip(".") for path, key, gate in self._found() if gate.group == group.name}
        roles = frozenset.union(*_PLACES.values())
        return tuple(s for s in group.spans if s.tensor in gated and s.role in roles)

    def fold(self) -> None:
        """Multiply z into the weights and take the gates away; the model computes exactly what it did."""
        self._leave(folded=True)

    def remove(self) -> None:
        """Take the gates away; weights and parameters are bit for bit those from before the insertion."""
        self._leave(folded=False)

    def _leave(self, *, folded: bool) -> None:
        places = list(dict.fromkeys((path, key) for path, key, _ in self._found()))
        # All values are read before the first gate goes, each tensor once: a tied weight has gates under several
        # names, and folded once per name it would be multiplied as often.
        values: dict[int, tuple[Tensor, Tensor]] = {}
        for path, key in places:
            module = self._model.get_submodule(path)
            stack = _stack(module, key)
            if not all(isinstance(gate, Gate) for gate in stack):
                raise UnsupportedError(
                    f"{f'{path}.{key}'!r} has another parametrisation beside its gate",
                    hint="remove that one first",
                )
            original = stack.original
            with torch.no_grad():
                values[id(original)] = (original, getattr(module, key).detach().clone())
        # torch registers a parameter anew when its parametrisation goes, behind all others, and optimizers and state
        # dicts know parameters by their order.
        orders = {path: gate.order for path, _, gate in self._found()}
        for path, key in places:
            module = self._model.get_submodule(path)
            own_class(module)
            parametrize.remove_parametrizations(module, key, leave_parametrized=False)
        for path, order in orders.items():
            held = self._model.get_submodule(path)._parameters
            held.update({key: held.pop(key) for key in order})
        if folded:
            with torch.no_grad():
                for original, value in values.values():
                    original.copy_(value)

    def _found(self) -> Iterator[tuple[str, str, Gate]]:
        for path, module in self._model.named_modules():
            if parametrize.is_parametrized(module):
                for key in module.parametrizations:
                    for gate in _stack(module, key):
                        if isinstance(gate, Gate):
                            yield path, key, gate


GateSide = Literal["consumer", "producer"]
_PLACES: dict[str, frozenset[str]] = {
    "consumer": frozenset({"in", "self"}),
    "producer": frozenset({"out", "scale", "bias", "self"}),
}


def insert_gates(model: nn.Module, groups: Sequence[Group], *, at: GateSide = "consumer") -> Gates:
    """Put a trainable factor z = 1 on every unit of the groups; works with and without norms.

    The gate multiplies weights, not activations, by a parametrisation: what the model computes is the same, and
    `Gates.fold` can multiply z in exactly. The factors are parameters of the model from now on (and of its
    state dict), one per group. A bad idea to keep while saving or cutting the model: fold or remove first.

    Args:
        model: changed in place.
        groups: the units; groups of tied weights are gated in all their uses.
        at: "consumer" gates what the next layers read of the unit, that is after norm and activation; it is
            right for every structure. "producer" gates the layer that computes the unit, or its norm where it
            has one (a gate in front of a norm would be cancelled by it).

    Returns:
        The handle with the factors, `fold` and `remove`.

    Raises:
        RecipeError: a group has no weights at that place, or is gated already; nothing is changed.
        UnsupportedError: "producer" where several layers produce the unit, or a norm without weight follows.

    Cost:
        One product per gated weight in every forward pass.

    Source:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017 (scaling
        factors as gates); Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, section
        3.2 (gates as scores).

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> spans = (Span("0.weight", torch.tensor([[0], [1]]), "out"), Span("2.weight", torch.tensor([[0, 1]]), "in"))
        >>> gates = insert_gates(net, [Group("hidden", "neuron", (2,), spans)])
        >>> gates.values["hidden"].detach()
        tensor([1., 1.])
        >>> gates.remove()
    """
    one_of("at", at, tuple(_PLACES))
    taken = gates_of(model).values
    doubled = [group.name for group in groups if group.name in taken]
    if doubled:
        raise RecipeError(f"{listed(doubled)} has gates already", hint="fold or remove them first")
    # Everything that can be refused is asked before the first gate goes in: a refusal leaves the model as it was.
    chosen = [(group, gated_spans(group, at)) for group in groups]
    owners = _owners(model)
    for _, spans in chosen:
        for span in spans:
            if span.tensor not in owners:
                raise InputError(f"the model has no parameter {span.tensor!r}", hint=suggestion(span.tensor, owners))
    order = {id(m): tuple(m._parameters) for homes in owners.values() for m, _ in homes}
    order |= {id(model.get_submodule(path)): gate.order for path, _, gate in gates_of(model)._found()}
    for group, spans in chosen:
        first = getattr(*owners[spans[0].tensor][0])
        z = nn.Parameter(torch.ones(group.shape, dtype=first.dtype, device=first.device))
        for span in spans:
            index = None if span.index is None else span.index.to(first.device)
            for module, key in owners[span.tensor]:
                parametrize.register_parametrization(module, key, Gate(group.name, z, index, order[id(module)]))
    return Gates(model)


def gates_of(model: nn.Module) -> Gates:
    """The gates that a model has; without any, `values` is empty."""
    return Gates(model)


def _stack(module: nn.Module, key: str) -> parametrize.ParametrizationList:
    found = module.parametrizations[key]  # type: ignore[index]
    assert isinstance(found, parametrize.ParametrizationList)
    return found


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Parameter name (the first one where tied) -> every module that holds it, and its name there."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, key))
    return {name: holders[id(parameter)] for name, parameter in model.named_parameters()}


def gated_spans(group: Group, at: str) -> list[Span]:
    """What the gates of a group stand on.

    Raises:
        RecipeError: the group has no weight there.
        UnsupportedError: it has several.
    """
    own = [s for s in group.spans if s.role == "self"]
    spans = own or [s for s in group.spans if s.role == "in"]
    if at == "producer" and not own:
        spans = _producing(group)
    if not spans:
        raise RecipeError(
            f"no weight to put the gates of {group.name!r} on",
            why="nothing consumes its units" if at == "consumer" else "nothing produces its units",
            hint=f"use at={'producer' if at == 'consumer' else 'consumer'!r}, or leave the group out",
        )
    return spans


def _producing(group: Group) -> list[Span]:
    """The norm's weight and bias where there is a norm, else those of the layer."""
    layers = [s for s in group.spans if s.role == "out"]
    norms = [s for s in group.spans if s.role == "scale"]
    bare = not norms and any(s.role == "state" for s in group.spans)
    if bare or len(norms) > 1 or len(layers) > 1:
        raise UnsupportedError(
            f"gates at the producer of {group.name!r} have no clear place",
            why="a norm without weight follows" if bare else "several layers or norms produce its units",
            hint="use at='consumer'",
        )
    last = norms or layers
    module = last[0].tensor.rpartition(".")[0] if last else ""
    biases = [s for s in group.spans if s.role == "bias" and s.tensor.rpartition(".")[0] == module]
    return last + biases if last else []
