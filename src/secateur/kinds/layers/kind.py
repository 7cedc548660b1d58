"""Whole layers: blocks of a stack that hand on a hidden state of the shape they read."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.integrations.transformers import shapes_of
from secateur.kinds.base import Candidates, Keep, Left, nothing
from secateur.kinds.edit import Edit
from secateur.kinds.expressible import require_native, require_transformers, searched
from secateur.kinds.layers.drop import dropped
from secateur.kinds.layers.followers import decision, probe
from secateur.kinds.layers.prove import certify_layers
from secateur.model.agreement import worst
from secateur.model.tensors import named_tensors, require_finite
from secateur.request import PROOF, Efforts, Request
from secateur.structure.around import surroundings
from secateur.structure.given import arguments
from secateur.structure.memos import memos
from secateur.structure.provenance import Attribute
from secateur.structure.stacks import Stack, find_stacks, holders_of
from secateur.structure.switches import forwards, switches
from secateur.types import Certificate, Condition, Example, Group, LayerEntry, Span


class LayerStacks(Candidates):
    """Stacks of blocks; a unit is a block."""

    unread = ("min_keep_fraction", "scales")

    def __init__(self, model: nn.Module, example: Example, request: Request, examples: Sequence[Example] = ()) -> None:
        super().__init__(model, example, request, examples)
        for name, tensor in named_tensors(model).items():
            require_finite(tensor, name)
        depth = find_stacks(model, example, request.protect)
        stacks = probe(model, example, depth.stacks)
        self.stacks = [stack for stack in stacks if stack.free]
        if not self.stacks:
            reasons = [lock.reason for stack in stacks for block in stack.blocks for lock in block.locks]
            often = sorted(set(reasons), key=lambda reason: (-reasons.count(reason), reason))[:3]
            raise nothing(
                model,
                "blocks that can be removed",
                why="; ".join(often) or "no stack of equal blocks runs",
                hint="Removable are elements of a ModuleList or Sequential with a residual path; else cut channels.",
            )
        self.groups = [_group(model, stack) for stack in self.stacks]
        self.conditions = (*depth.conditions, *asked(model, example, depth.conditions))
        held = {
            _name(model, stack): [
                UnitContent(b.parameters, [model.get_submodule(b.name)], b.macs) for b in stack.blocks
            ]
            for stack in self.stacks
        }
        self._sizes = sizes(model, held, depth.macs)

    def least(self, group: Group, scope: str) -> int:
        """Locked blocks stay, and as many as asked; a tenth of a stack is no floor that anybody expects."""
        return max(self.request.min_keep, sum(not free for free in group.attributes["free"]))

    def stays(self, group: Group) -> Tensor:
        """Locked blocks."""
        return ~torch.tensor(group.attributes["free"])

    def price(self, what: str, left: Left) -> int:
        """Exact: what several units hold goes with the last of them, and what anything else holds stays."""
        gone = {(name, place) for name, mask in left.keep.items() for place, stays in enumerate(mask) if not stays}
        alone = sum(self._sizes.parts[what][name][place] for name, place in gone)
        return self._sizes.whole[what] - alone - sum(s.sizes[what] for s in self._sizes.shared if s.units <= gone)

    def write(self, keep: Keep) -> Edit:
        """Which places go, and what counts or numbers the blocks."""
        whole = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self.groups}
        layers, attributes = decision(self.model, self.example, self.stacks, {**whole, **keep})
        if self.request.expressible:
            attributes = {**attributes, **self._native(layers, attributes)}
        return Edit(attributes=attributes, layers=layers)

    def _native(self, layers: Mapping[str, LayerEntry], attributes: Mapping[Attribute, int]) -> dict[Attribute, int]:
        require_transformers(self.model)
        with dropped(self.model, layers, attributes):
            shapes, start = shapes_of(self.model), copy.deepcopy(self.model.config)
        return searched(self.model, shapes, start)

    def prove(
        self,
        whole: nn.Module,
        cut: nn.Module,
        keep: Keep,
        *,
        dtype: str,
        tolerance: float | None,
        effort: Efforts = PROOF,
        edit: Edit | None = None,
    ) -> Certificate:
        """By the original with identity in the place of what goes."""
        layers = {
            stack.path: LayerEntry(size=stack.size, removed=torch.nonzero(~mask).flatten().tolist(), lists=[])
            for stack, group in zip(self.stacks, self.groups, strict=True)
            if (mask := keep.get(group.name)) is not None and not bool(mask.all())
        }
        proof = worst(
            certify_layers(whole, cut, example, layers, dtype=dtype, tolerance=tolerance, effort=effort)
            for example in (self.example, *self.examples)
        )
        if self.request.expressible:
            require_native(cut, self.example)
        return proof


def asked(model: nn.Module, example: Example, said: Sequence[Condition]) -> Iterator[Condition]:
    """What the code decides by beside what it was seen to: arguments, switches, surroundings; each line once."""
    known = {condition.where for condition in said}
    own = forwards(model)
    branches = (*arguments(model, example), *switches(own), *surroundings(own))
    for condition in (*(branch.condition for branch in branches), *memos(own)):
        if condition.where not in known:
            yield condition


def _group(model: nn.Module, stack: Stack) -> Group:
    """Blocks as units. What runs is named for criteria that watch it."""
    known = {
        "blocks": tuple(block.name for block in stack.blocks),
        "free": tuple(not block.locks for block in stack.blocks),
        "channel_dim": tuple(block.channel_dim for block in stack.blocks),
    }
    spans = unit_spans(model, [block.parameters for block in stack.blocks])
    return Group(_name(model, stack), "layer", (stack.size,), spans, attributes=known)


def _name(model: nn.Module, stack: Stack) -> str:
    return stack.path or type(model).__name__


def unit_spans(model: nn.Module, units: Sequence[Sequence[str]]) -> tuple[Span, ...]:
    """Every parameter of a unit belongs to it whole; `units` names them for one unit after the other."""
    tensors = dict(model.named_parameters())
    return tuple(
        Span(name, torch.full([1] * tensors[name].dim(), number), "self")
        for number, names in enumerate(units)
        for name in names
    )


class UnitContent(NamedTuple):
    """What goes with a unit.

    Args:
        parameters: names of those that nothing else holds.
        modules: their buffers go as well.
        macs: multiply-accumulates for one sample.
    """

    parameters: Sequence[str]
    modules: Sequence[nn.Module]
    macs: int


@dataclass(frozen=True)
class SharedWeight:
    """Parameters that some units hold and nothing else.

    Args:
        units: (group, place) of each.
        sizes: what is counted -> how much of it.
    """

    units: frozenset[tuple[str, int]]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class UnitSizes:
    """Parameters, bytes and multiply-accumulates.

    Args:
        whole: what is counted -> of the model.
        parts: what is counted -> group -> what goes with each unit alone.
        shared: what goes with several units.
    """

    whole: Mapping[str, int]
    parts: Mapping[str, Mapping[str, Sequence[int]]]
    shared: Sequence[SharedWeight]


def sizes(model: nn.Module, units: Mapping[str, Sequence[UnitContent]], macs: int) -> UnitSizes:
    """What the model costs, and what goes with its units."""
    tensors = named_tensors(model)
    whole = {
        "params": sum(p.numel() for p in model.parameters()),
        "memory_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "macs": macs,
    }
    parts: dict[str, dict[str, list[int]]] = {what: {} for what in whole}
    for name, held in units.items():
        parameters = [[tensors[p] for p in unit.parameters] for unit in held]
        # Buffers have bytes too: masks and tables of angles can be as large as the weights of a small block.
        state = [[buffer for module in unit.modules for buffer in module.buffers()] for unit in held]
        parts["params"][name] = [sum(p.numel() for p in ps) for ps in parameters]
        parts["memory_bytes"][name] = [
            sum(t.numel() * t.element_size() for t in (*ps, *bs)) for ps, bs in zip(parameters, state, strict=True)
        ]
        parts["macs"][name] = [unit.macs for unit in held]
    return UnitSizes(whole, parts, _shared(model, units))


def _shared(model: nn.Module, units: Mapping[str, Sequence[UnitContent]]) -> list[SharedWeight]:
    holders, seen = holders_of(model), defaultdict[int, Counter[tuple[str, int]]](Counter)
    for name, held in units.items():
        for place, unit in enumerate(held):
            for module in {id(m): m for outer in unit.modules for m in outer.modules()}.values():
                for parameter in module.parameters(recurse=False):
                    seen[id(parameter)][name, place] += 1
    tensors = {id(p): p for p in model.parameters()}
    return [
        SharedWeight(
            frozenset(counts),
            {
                "params": tensors[key].numel(),
                "memory_bytes": tensors[key].numel() * tensors[key].element_size(),
                "macs": 0,
            },
        )
        for key, counts in seen.items()
        if len(counts) > 1 and counts.total() == holders[key][1]
    ]
