"""What follows when blocks go: the integers that count or number them, the lists that have one item for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, ForwardError, UnsupportedError
from secateur.kinds.layers.drop import Layers, block_names, dropped
from secateur.kinds.layers.prove import identity_agreement, identity_outputs
from secateur.model.call import call, outputs
from secateur.structure.capture import quiet
from secateur.structure.provenance import Attribute, owners
from secateur.structure.stacks import Stack
from secateur.types import Example, LayerEntry, Lock

INDEX = re.compile(r"(^|_)(idx|index|id|layer|block|number|num|no|i|depth)s?($|_)")
LENGTH = re.compile(r"(^|_)(n_?)?(layers?|blocks?|depths?)$")
PER_LAYER = re.compile(r"(^|_)(layers?|blocks?|attention_window)(_|$)")
SIDES = ("encoder", "decoder")


@dataclass(frozen=True, eq=False)
class Followers:
    """Integers and lists that follow the blocks of one stack.

    Args:
        index: attribute names, relative to the block, that hold its place -> offset of the place.
        length: integers that hold the number of blocks.
        lists: (owner, name) of lists with one item per block.
    """

    index: Mapping[tuple[str, str], int]
    length: tuple[Attribute, ...]
    lists: tuple[tuple[str, str], ...]


def followers(model: nn.Module, stack: Stack) -> Followers:
    """Find what counts or numbers the blocks of a stack, by value and name; `probe` puts it to the test."""
    return Followers(_index(model, stack), tuple(_lengths(model, stack)), tuple(_lists(model, stack)))


def _index(model: nn.Module, stack: Stack) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] | None = None
    for block in stack.blocks:
        here = {
            (path, name): value - block.index
            for path, module in model.get_submodule(block.name).named_modules()
            for name, value in vars(module).items()
            if type(value) is int and INDEX.search(name)
        }
        found = here if found is None else {k: v for k, v in found.items() if here.get(k) == v}
    # Blocks are numbered from 0 or from 1; a number at any other distance is a size that happens to grow along.
    return {k: v for k, v in (found or {}).items() if v in (0, 1)}


def _around(model: nn.Module, stack: Stack) -> Iterator[tuple[str, object]]:
    """Modules around the stack and the configs that they hold."""
    for path, owner in owners(model):
        holder = path if isinstance(owner, nn.Module) else path.rpartition(".")[0]
        if holder == "" or (stack.path + ".").startswith(f"{holder}."):
            yield path, owner


def _of_this_side(stack: Stack, path: str, name: str, names: Sequence[str]) -> bool:
    """Whether a name means this stack, in models that have an encoder and a decoder."""
    mine = [side for side in SIDES if side in stack.path]
    if len(mine) != 1 or mine[0] in name:
        return not any(side in name for side in SIDES if side not in mine) or bool(mine and mine[0] in name)
    if any(side in name for side in SIDES):
        return False
    own_name_exists = any(mine[0] in other and LENGTH.search(other) for other in names)
    return mine[0] in path or not own_name_exists


def _lengths(model: nn.Module, stack: Stack) -> Iterator[Attribute]:
    stages = [int(part) for part in stack.path.split(".") if part.isdigit()]
    for path, owner in _around(model, stack):
        names = list(vars(owner))
        for name, value in vars(owner).items():
            if not LENGTH.search(name) or not _of_this_side(stack, path, name, names):
                continue
            # Of a stage of several, a number outside it would count the stages.
            if type(value) is int and value == stack.size and (not stages or _digits(path) == len(stages)):
                yield Attribute(path, name)
            if type(value) in (list, tuple) and stages and stages[-1] < len(value):
                item = value[stages[-1]]
                if type(item) is int and item == stack.size:
                    yield Attribute(path, name, stages[-1])


def _digits(path: str) -> int:
    return sum(part.isdigit() for part in path.split("."))


def _lists(model: nn.Module, stack: Stack) -> Iterator[tuple[str, str]]:
    staged = any(part.isdigit() for part in stack.path.split("."))
    for path, owner in _around(model, stack):
        names = list(vars(owner))
        for name, value in vars(owner).items():
            fits = type(value) in (list, tuple) and len(value) == stack.size and PER_LAYER.search(name)
            if fits and not staged and _of_this_side(stack, path, name, names):
                yield path, name


def edits_of(
    model: nn.Module, stacks: Sequence[Stack], keep: Mapping[str, Tensor], *, renumber: bool
) -> tuple[Layers, dict[Attribute, int]]:
    """The removals in plan form and the integers that follow; where two stacks disagree the integer stays."""
    layers: dict[str, LayerEntry] = {}
    attributes: dict[Attribute, int] = {}
    disputed: set[Attribute] = set()
    for stack in stacks:
        stays = keep[stack.path or type(model).__name__]
        left = [block for block, k in zip(stack.blocks, stays, strict=True) if k]
        if len(left) == stack.size:
            continue
        found = followers(model, stack)
        removed = torch.nonzero(~stays).flatten().tolist()
        layers[stack.path] = {"size": stack.size, "removed": removed, "lists": [list(pair) for pair in found.lists]}
        for attribute in found.length:
            if attributes.setdefault(attribute, len(left)) != len(left):
                disputed.add(attribute)
        # A block that goes leaves its number to the next: masks and caches are often looked up by it.
        for (path, name), offset in found.index.items() if renumber else ():
            for place, block in enumerate(left):
                owner = f"{block.name}.{path}" if path else block.name
                if place != block.index:
                    attributes[Attribute(owner, name)] = place + offset
    return layers, {a: v for a, v in attributes.items() if a not in disputed}


def decision(
    model: nn.Module, example: Example, stacks: Sequence[Stack], keep: Mapping[str, Tensor]
) -> tuple[Layers, dict[Attribute, int]]:
    """The removals and what follows them; the place numbers of the blocks stay where the forward computes with them.

    Raises:
        UnsupportedError: either way the result is not the model with identity blocks.
    """
    layers, attributes = edits_of(model, stacks, keep, renumber=True)
    if not layers or _fault(model, example, layers, attributes) is None:
        return layers, attributes
    kept_numbers = edits_of(model, stacks, keep, renumber=False)
    fault = _fault(model, example, *kept_numbers)
    if fault is not None:
        raise UnsupportedError(
            "The model without these blocks is not the model with identity in their place.",
            why=f"{', '.join(block_names(model, layers))}: {fault.why or fault.what}",
            hint="Each of them can go by itself; ask for less, or protect the ones that other code depends on.",
        )
    return kept_numbers


def probe(model: nn.Module, example: Example, stacks: Sequence[Stack]) -> list[Stack]:
    """Try to take blocks out, one at a time, and lock those whose absence is not the same as an identity.

    Tried are the first, the middle and the last free block of every stack and those whose parameters are unlike most;
    where the middle one fails all are tried. The certificate of a plan holds for its choice as a whole.

    Cost: two forward passes per trial; the model is patched meanwhile and restored.
    """
    result = []
    for stack in stacks:
        free = stack.free
        if not free:
            result.append(stack)
            continue
        middle = free[len(free) // 2]
        odd = {i for i in free if _signature(model, stack, i) != _signature(model, stack, middle)}
        reasons = {
            i: lock for i in sorted({free[0], middle, free[-1], *odd}) if (lock := _trial(model, example, stack, i))
        }
        if middle in reasons:
            rest = {i: lock for i in free if i not in reasons and (lock := _trial(model, example, stack, i))}
            reasons = {**reasons, **rest}
        result.append(stack.locked(reasons))
    return result


def _signature(model: nn.Module, stack: Stack, index: int) -> list[tuple[str, torch.Size]]:
    return [(name, p.shape) for name, p in model.get_submodule(stack.blocks[index].name).named_parameters()]


def _trial(model: nn.Module, example: Example, stack: Stack, index: int) -> Lock | None:
    stays = torch.ones(stack.size, dtype=torch.bool)
    stays[index] = False
    name = stack.path or type(model).__name__
    try:
        decision(model, example, [stack], {name: stays})
    except UnsupportedError as error:
        reason = f"other code depends on the block; without it: {error.why.partition(': ')[2]}"
        return Lock(reason, module=stack.blocks[index].name)
    return None


def _fault(
    model: nn.Module, example: Example, layers: Layers, attributes: Mapping[Attribute, int]
) -> CertificateError | ForwardError | None:
    """Why the model without the blocks is not the model with identity in their place; None if it is."""
    gone = set(block_names(model, layers))
    kept = [
        m for path in layers for name, m in model.get_submodule(path).named_children() if _at(path, name) not in gone
    ]
    with handed(kept) as before:
        expected = identity_outputs(model, example, layers)
    try:
        with dropped(model, layers, attributes), quiet(model), torch.no_grad(), handed(kept) as after:
            found = [t.detach() for t in outputs(call(model, example))]
        identity_agreement(expected, found, None)
    except (CertificateError, ForwardError) as error:
        return error
    if before != after:
        # Equal outputs on the example prove nothing then: a window wider than the example, for instance, shows nothing.
        return CertificateError(
            "Blocks that stay are called with other arguments.",
            why="the code chooses arguments by the number of the block, and the numbers move up",
        )
    return None


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@contextmanager
def handed(blocks: Iterable[nn.Module]) -> Iterator[list[tuple[int, list[object]]]]:
    """Note what plain values (numbers, switches, names) every block is called with, call by call."""
    seen: list[tuple[int, list[object]]] = []

    def note(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.append((id(block), list(_plain([*args, *kwargs.values()]))))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _plain(tree: object) -> Iterator[object]:
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _plain(item)
    elif tree is None or type(tree) in (bool, int, float, str):
        yield tree
