"""Layers found by execution: repeated blocks that read a hidden state and hand on one of the same shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from secateur.measure.macs import macs_by_module
from secateur.model.call import call
from secateur.structure.block_runs import BlockRun, BlockRuns
from secateur.structure.capture import quiet
from secateur.structure.groups import protected_tensors
from secateur.structure.ran import Ways
from secateur.structure.rounded import rounded
from secateur.structure.turns import by_place
from secateur.structure.untaken import untaken
from secateur.types import Condition, Example, Lock


@dataclass(frozen=True, eq=False)
class StackBlock:
    """One element of a stack.

    Args:
        index: its place in the stack.
        name: qualified name of the module.
        parameters: names of the parameters that nothing outside the block holds.
        macs: multiply-accumulates of one forward pass through it for one sample.
        channel_dim: dimension of the hidden state that holds the features.
        locks: why it may not be removed; empty = free.
    """

    index: int
    name: str
    parameters: tuple[str, ...]
    macs: int
    channel_dim: int = -1
    locks: tuple[Lock, ...] = ()


@dataclass(frozen=True, eq=False)
class Stack:
    """A ModuleList or Sequential whose elements run one after the other.

    Args:
        path: qualified name of the container.
        blocks: all its elements, in order.
    """

    path: str
    blocks: tuple[StackBlock, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.blocks)

    @property
    def free(self) -> list[int]:
        """Places of the blocks that may be removed."""
        return [block.index for block in self.blocks if not block.locks]

    def locked(self, reasons: Mapping[int, Lock]) -> Stack:
        """The same stack with further blocks locked."""
        blocks = (replace(b, locks=(*b.locks, reasons[b.index])) if b.index in reasons else b for b in self.blocks)
        return Stack(self.path, tuple(blocks))


@dataclass(frozen=True, eq=False)
class Depth:
    """What a model holds in depth.

    Args:
        stacks: its stacks, in the model's order.
        macs: multiply-accumulates of one forward pass of the whole model for one sample.
        conditions: what the run depended on: decisions that only went one way, and what the code does with the places
            of blocks.
    """

    stacks: tuple[Stack, ...]
    macs: int
    conditions: tuple[Condition, ...] = ()


def find_stacks(model: nn.Module, example: Example, protect: Sequence[str] = ()) -> Depth:
    """Find every stack of removable blocks.

    A block is removable where it runs once, its first tensor result has the shape of its first tensor argument, and
    its input reaches its output on a path without any product or convolution (the residual path) beside one that has
    some: then leaving it out keeps the hidden state meaningful. Of nested stacks the outermost is taken.

    Args:
        model: left as it is.
        example: what `secateur.model.call.call` takes.
        protect: patterns of module or parameter names, or "type:ClassName", that stay.

    Returns:
        stacks with at least two blocks that qualify by themselves, in the model's order; locked blocks say why.

    Raises:
        ForwardError: the forward fails on the example.
        RecipeError: a pattern of `protect` matches nothing.

    Cost: two forward passes plus about 20 microseconds per operation.
    """
    containers = {path: module for path, module in model.named_modules() if _is_container(module)}
    runs = BlockRuns({f"{path}.{i}" if path else str(i): m for path, c in containers.items() for i, m in _numbered(c)})
    ways = Ways()
    with quiet(model, example), runs.hooks(), runs, ways.watching(str):
        call(model, example)
    costs = macs_by_module(model, example)
    guarded = protected_tensors(model, dict(model.named_parameters()), protect)
    names = {id(module): name for name, module in model.named_modules()}
    held, holders = names_of(model), holders_of(model)
    stacks = []
    for path, container in containers.items():
        blocks = []
        for i, module in _numbered(container):
            name, own = names[id(module)], own_parameters([module], holders)
            seen = runs.seen.get(id(module), BlockRun())
            locks = [*_reasons(seen, name), *(guarded[p] for p in own if p in guarded)]
            if held[id(module)] > 1:
                locks.append(Lock("the block stands in several places of the model", module=name))
            blocks.append(StackBlock(i, name, tuple(own), costs.get(name, 0), seen.channel_dim, tuple(locks[:1])))
        stack = Stack(path, tuple(blocks))
        # One block that qualifies is no stack: a container with a single residual element is an ordinary sequence.
        if sum(not _reasons(runs.seen.get(id(m), BlockRun()), "") for _, m in _numbered(container)) > 1:
            stacks.append(_in_order(stack, runs))
    stacks = [s for s in stacks if not any(_inside(s, other) for other in stacks)]
    places = [c for s in stacks if s.free for c in by_place(s.path, [runs.called.get(_at(s, b), []) for b in s.blocks])]
    counted = [c for c in rounded(ways.pieces) if any(_counts(c.text, s.path) for s in stacks)]
    return Depth(tuple(stacks), costs[""], (*places, *counted, *untaken(model, ways)))


def _counts(text: str, stack: str) -> bool:
    """Whether an expression may hold the number of blocks of a stack."""
    return re.search(rf"len\(|layer|depth|block|\b{re.escape(stack.rpartition('.')[2])}\b", text) is not None


def _at(stack: Stack, block: StackBlock) -> str:
    """Name of a block by its place, as runs are told of it."""
    return f"{stack.path}.{block.index}" if stack.path else str(block.index)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1


def _numbered(container: nn.Module) -> list[tuple[int, nn.Module]]:
    """(place, element), or nothing where one element stands in two places: then places do not name blocks."""
    return list(enumerate(container.children())) if len(set(container.children())) == len(container._modules) else []


def names_of(model: nn.Module) -> dict[int, int]:
    """Module id -> under how many names the model reaches it."""
    counts: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        counts[id(module)] = counts.get(id(module), 0) + 1
    return counts


def holders_of(model: nn.Module) -> dict[int, tuple[str, int]]:
    """Parameter id -> its first name, and how many modules hold it; one walk for all blocks."""
    names = {id(p): name for name, p in model.named_parameters()}
    counts = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {key: (name, counts[key]) for key, name in names.items()}


def own_parameters(modules: Sequence[nn.Module], holders: Mapping[int, tuple[str, int]]) -> list[str]:
    """Parameters that go with some modules: those that no module outside of them holds (a tied weight stays).

    Args:
        modules: with all that is in them.
        holders: as `holders_of` gives it.
    """
    inner = {id(inside): inside for module in modules for inside in module.modules()}
    counts = Counter(id(p) for module in inner.values() for p in module.parameters(recurse=False))
    return [holders[key][0] for key, count in counts.items() if holders[key][1] == count]


def _inside(stack: Stack, other: Stack) -> bool:
    """Whether a stack lies in a removable block of another: the outer one then decides about both."""
    return any(stack.path == b.name or stack.path.startswith(f"{b.name}.") for b in other.blocks if not b.locks)


def _reasons(seen: BlockRun, name: str) -> list[Lock]:
    if seen.calls == 0:
        return [Lock("the block does not run on the example", module=name)]
    if seen.calls > 1:
        return [Lock("the block runs several times in one forward pass", module=name)]
    if not seen.same_shape:
        return [Lock("the block's output has not the shape of its input", module=name)]
    if not seen.mixes:
        return [Lock("the block holds no product or convolution", module=name)]
    if not seen.residual:
        hint = "remove its channels instead"
        return [Lock("the block has no residual path from its input to its output", module=name, hint=hint)]
    return []


def _in_order(stack: Stack, runs: BlockRuns) -> Stack:
    """The stack, locked where its blocks run in another order than they stand: plans name them by place."""
    turns = {b.index: runs.turn.get(b.name, -1) for b in stack.blocks if not b.locks}
    if list(turns.values()) == sorted(turns.values()):
        return stack
    reason = Lock("the blocks do not run in their order", module=stack.path)
    return stack.locked(dict.fromkeys(turns, reason))
