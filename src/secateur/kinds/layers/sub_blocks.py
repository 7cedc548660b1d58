"""Branches of blocks: attention and MLP of a transformer layer, each by itself; the blocks stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, ForwardError, UnsupportedError
from secateur.kinds.base import Candidates, Keep, nothing
from secateur.kinds.edit import Edit
from secateur.kinds.layers.cached import certify_cached, short
from secateur.kinds.layers.drop import dropped, with_stubs
from secateur.kinds.layers.kind import LayerStacks, UnitContent, asked, sizes, unit_spans
from secateur.kinds.layers.prove import branch_agreement, branch_outputs, certify_branches, require_silent
from secateur.measure.macs import macs_by_module
from secateur.model.agreement import worst
from secateur.model.call import call, fresh, outputs
from secateur.model.guard import evaluating
from secateur.model.tensors import named_tensors, require_finite
from secateur.request import PROOF, Efforts, Request
from secateur.structure.branches import ResidualBranch, find_branches
from secateur.structure.capture import quiet
from secateur.structure.groups import protected_tensors
from secateur.structure.stacks import Stack, find_stacks, holders_of, names_of, own_parameters
from secateur.types import Certificate, Example, Group, LayerEntry, LeftOut, Lock, StubEntry


class SubBlocks(LayerStacks):
    """Stacks of blocks; a unit is a branch: what a block computes and adds to its hidden state."""

    def __init__(self, model: nn.Module, example: Example, request: Request, examples: Sequence[Example] = ()) -> None:
        Candidates.__init__(self, model, example, request, examples)
        for name, tensor in named_tensors(model).items():
            require_finite(tensor, name)
        if request.expressible:
            raise UnsupportedError(
                f"No config of {type(model).__name__} says that a layer lacks its attention or its MLP.",
                why="from_pretrained builds all layers alike",
                hint="Leave expressible out and load with secateur.load(), or remove whole layers (granularity layer).",
            )
        depth = find_stacks(model, example)
        found = find_branches(model, example, [b.name for stack in depth.stacks for b in stack.blocks if not b.locks])
        self.branches: dict[str, list[ResidualBranch]] = {}
        self.groups, self.stacks = [], []
        holders, costs = holders_of(model), macs_by_module(model, example)
        held: dict[str, list[UnitContent]] = {}
        reasons: list[str] = []
        for stack in depth.stacks:
            branches = [branch for block in stack.blocks for branch in found.get(block.name, ())]
            units = [_held(model, branch, holders, costs) for branch in branches]
            locks = self._locks(stack, branches, units)
            reasons += [lock.reason for lock in locks.values()]
            if len(locks) < len(branches):
                group = _group(model, stack, branches, units, locks)
                self.branches[group.name], held[group.name] = branches, units
                self.groups.append(group)
                self.stacks.append(stack)
        self._sizes = sizes(model, held, depth.macs)
        if not self.groups:
            often = [reason for reason, _ in Counter(reasons).most_common(3)]
            raise nothing(
                model,
                "branches that can be removed",
                why="; ".join(often) or "no block adds what it computes to its hidden state where that is seen",
                hint="What is summed side by side first, turned, or run fused goes with its layer: granularity layer.",
            )
        self.left_out = [
            LeftOut(called, params, why)
            for group in self.groups
            for called, why, params in zip(
                group.attributes["blocks"],
                group.attributes["why"],
                self._sizes.parts["params"][group.name],
                strict=True,
            )
            if why
        ]
        self.conditions = (*depth.conditions, *asked(model, example, depth.conditions))

    def write(self, keep: Keep) -> Edit:
        """What takes the place of the branches that go."""
        layers = {}
        for stack in self.stacks:
            name = group_of(stack.path)
            gone = [b for b, stays in zip(self.branches[name], keep.get(name, ()), strict=False) if not stays]
            if gone:
                layers[stack.path] = _entry(stack, gone)
        return Edit(layers=layers)

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
        """By the original that computes the branches that go and does not add them; and by the cut with its cache."""
        gone = [
            branch
            for name, mask in keep.items()
            for branch, stays in zip(self.branches[name], mask, strict=True)
            if not stays
        ]
        layers = (edit or self.write(keep)).layers
        for example in (self.example, *self.examples):
            branch_agreement(branch_outputs(whole, example, gone), as_called(cut, example), tolerance)
            require_silent(cut, example, gone)
        proof = worst(
            certify_branches(whole, cut, example, gone, layers, dtype=dtype, tolerance=tolerance, effort=effort)
            for example in (self.example, *self.examples)
        )
        return certify_cached(whole, cut, self.example, proof)

    def _locks(
        self, stack: Stack, branches: Sequence[ResidualBranch], units: Sequence[UnitContent]
    ) -> dict[ResidualBranch, Lock]:
        """Why some branches may not go."""
        guarded = protected_tensors(self.model, dict(self.model.named_parameters()), self.request.protect)
        names = names_of(self.model)
        locks: dict[ResidualBranch, Lock] = {}
        for branch, unit in zip(branches, units, strict=True):
            kept = [guarded[name] for name in unit.parameters if name in guarded]
            shared = [module for module in unit.modules if names[id(module)] > 1]
            if branch.why:
                locks[branch] = Lock(branch.why, module=branch.block)
            elif kept:
                locks[branch] = kept[0]
            elif shared:
                locks[branch] = Lock("a module of it stands in several places of the model", module=branch.block)
        free = [branch for branch in branches if branch not in locks]
        return locks | self._probed(stack, free)

    def _probed(self, stack: Stack, free: Sequence[ResidualBranch]) -> dict[ResidualBranch, Lock]:
        """Branches whose absence is not seen to be what it should be, tried one at a time.

        Tried are the first, the middle and the last of each sort, all where the middle one fails. With a cache, on an
        input of a few tokens, the first of each sort is tried, and all where it fails: caches count by their layers.
        """
        sorts: dict[tuple[object, ...], list[ResidualBranch]] = {}
        for branch in free:
            sorts.setdefault(_sort(branch), []).append(branch)
        locks: dict[ResidualBranch, Lock] = {}
        for alike in sorts.values():
            middle = alike[len(alike) // 2]
            faults = {middle: self._fault(stack, middle)}
            for branch in alike if faults[middle] else (alike[0], alike[-1]):
                if branch not in faults:
                    faults[branch] = self._fault(stack, branch)
            for branch, why in faults.items():
                if why:
                    locks[branch] = Lock(f"other code depends on the branch; without it: {why}", module=branch.block)
        few = short(self.model, self.example)
        if few is not None:
            with evaluating(self.model):
                for alike in sorts.values():
                    for branch in (one for one in alike if one not in locks):
                        with dropped(self.model, {stack.path: _entry(stack, [branch])}, {}):
                            why = few(self.model)
                        if why:
                            locks[branch] = Lock(f"without it: {why}", module=branch.block)
                        elif branch is alike[0]:
                            break
        return locks

    def _fault(self, stack: Stack, branch: ResidualBranch) -> str:
        expected = branch_outputs(self.model, self.example, [branch])
        try:
            with dropped(self.model, {stack.path: _entry(stack, [branch])}, {}):
                with quiet(self.model), torch.no_grad():
                    found = [t.detach() for t in outputs(call(self.model, fresh(self.example)))]
                branch_agreement(expected, found, None)
                branch_agreement(expected, as_called(self.model, self.example), None)
                require_silent(self.model, self.example, [branch])
        except (CertificateError, ForwardError) as error:
            return error.why or error.what
        return ""


def as_called(model: nn.Module, example: Example) -> list[Tensor]:
    """Outputs as a user gets them, with fused kernels, for which some code asks the modules that it does not call.

    Raises:
        ForwardError: the forward fails.
    """
    with evaluating(model, example=example), torch.no_grad():
        return [t.detach() for t in outputs(call(model, fresh(example)))]


def group_of(path: str) -> str:
    """Name of the group of a stack's branches: not that of the stack, which is what its blocks are called by."""
    return f"{path}.sub_blocks".lstrip(".")


def _sort(branch: ResidualBranch) -> tuple[object, ...]:
    """What branches have in common that are tried together: what runs for them, whichever block it is in."""
    names = tuple((part.name.removeprefix(f"{branch.block}."), part.items) for part in branch.modules)
    return (branch.place.module.removeprefix(branch.block), branch.place.number, names)


def _entry(stack: Stack, gone: Iterable[ResidualBranch]) -> LayerEntry:
    """The removal in plan form. Every module gives zeros: of several side by side each adds something by itself."""
    stubs = {part.name: StubEntry(items=part.items) for branch in gone for part in branch.modules}
    return with_stubs(stack.size, [], [], stubs)


def _held(
    model: nn.Module, branch: ResidualBranch, holders: Mapping[int, tuple[str, int]], costs: Mapping[str, int]
) -> UnitContent:
    modules = [model.get_submodule(part.name) for part in branch.modules]
    return UnitContent(
        own_parameters(modules, holders), modules, sum(costs.get(part.name, 0) for part in branch.modules)
    )


def _group(
    model: nn.Module,
    stack: Stack,
    branches: Sequence[ResidualBranch],
    units: Sequence[UnitContent],
    locks: Mapping[ResidualBranch, Lock],
) -> Group:
    """Branches as units, with why some of them stay."""
    dims = {block.name: block.channel_dim for block in stack.blocks}
    known = {
        "blocks": tuple(_called(model, branch) for branch in branches),
        "free": tuple(branch not in locks for branch in branches),
        "why": tuple(locks[branch].reason if branch in locks else "" for branch in branches),
        "channel_dim": tuple(dims[branch.block] for branch in branches),
        "branches": tuple(branches),
    }
    spans = unit_spans(model, [unit.parameters for unit in units])
    return Group(group_of(stack.path), "sub_block", (len(branches),), spans, attributes=known)


def _called(model: nn.Module, branch: ResidualBranch) -> str:
    """A branch by the name of its largest module."""
    if not branch.modules:
        return branch.block
    sizes = {part.name: sum(p.numel() for p in model.get_submodule(part.name).parameters()) for part in branch.modules}
    return max(sizes, key=sizes.__getitem__)
