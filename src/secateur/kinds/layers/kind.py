"""Whole layers: blocks of a stack that hand on a hidden state of the shape they read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

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
from secateur.structure.stacks import Stack, find_stacks
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
        self._whole, self._parts = _sizes(model, self.stacks, depth.macs)

    def least(self, group: Group, scope: str) -> int:
        """Locked blocks stay, and as many as asked; a tenth of a stack is no floor that anybody expects."""
        return max(self.request.min_keep, sum(not free for free in group.attributes["free"]))

    def stays(self, group: Group) -> Tensor:
        """Locked blocks."""
        return ~torch.tensor(group.attributes["free"])

    def price(self, what: str, left: Left) -> int:
        """Exact, as nothing counted is shared between what goes and what stays."""
        parts = (
            (part, stays)
            for name, mask in left.keep.items()
            for part, stays in zip(self._parts[what][name], mask, strict=True)
        )
        return self._whole[what] - sum(part for part, stays in parts if not stays)

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
    """Blocks as units: every weight of a block belongs to its unit. What runs is named for criteria that watch it."""
    tensors = dict(model.named_parameters())
    spans = [
        Span(name, torch.full([1] * tensors[name].dim(), block.index), "self")
        for block in stack.blocks
        for name in block.parameters
    ]
    known = {
        "blocks": tuple(block.name for block in stack.blocks),
        "free": tuple(not block.locks for block in stack.blocks),
        "channel_dim": tuple(block.channel_dim for block in stack.blocks),
    }
    return Group(stack.path or type(model).__name__, "layer", (stack.size,), tuple(spans), attributes=known)


Parts = dict[str, dict[str, list[int]]]  # what is counted -> stack -> block


def _sizes(model: nn.Module, stacks: Sequence[Stack], macs: int) -> tuple[dict[str, int], Parts]:
    """Parameters, bytes and multiply-accumulates of the model, and of every block what goes with it."""
    tensors = named_tensors(model)
    whole = {
        "params": sum(p.numel() for p in model.parameters()),
        "memory_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "macs": macs,
    }
    parts: Parts = {what: {} for what in whole}
    for stack in stacks:
        name = stack.path or type(model).__name__
        held = [[tensors[p] for p in block.parameters] for block in stack.blocks]
        # Buffers have bytes too: masks and tables of angles can be as large as the weights of a small block.
        state = [list(model.get_submodule(block.name).buffers()) for block in stack.blocks]
        parts["params"][name] = [sum(p.numel() for p in ps) for ps in held]
        parts["memory_bytes"][name] = [
            sum(t.numel() * t.element_size() for t in (*ps, *bs)) for ps, bs in zip(held, state, strict=True)
        ]
        parts["macs"][name] = [block.macs for block in stack.blocks]
    return whole, parts
