"""Whole experts as units: fused expert weights that a router addresses by number.

Capture locks the expert dimension, since `topk` and grouped products address experts by number. For one granularity
these locks are lifted: when the router's rows and the expert weights lose the same experts, the numbers that the router
gives are places in the smaller weights. Nothing is known here about any architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from secateur.kinds.experts.numbers import is_count, mixed
from secateur.structure.axes import Atom, Axis, leaves, resolve, unit_index
from secateur.structure.groups import Structure, protected_tensors
from secateur.structure.provenance import Attribute, owners
from secateur.structure.trace import Axes, Trace
from secateur.types import Group, Lock, Span

RANKING = re.compile(r"aten\.(topk|sort|argsort|argmax|max|gather|scatter)\b")
LIFTED = (
    "number",
    "the result names positions",
    "the model's output",
    "size from the code",
    "size computed in the code",
    "a softmax runs over",
)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The experts of one block.

    Args:
        path: module that holds the router and the experts.
        size: how many experts there are.
        atom: the expert dimension, one for router and experts.
        routers: weights of the router.
        biases: tensors with one number per expert that go with what the router gives.
        used: experts that the router picks for each token, at most.
        locks: why no expert may go.
    """

    path: str
    size: int
    atom: Atom
    routers: tuple[str, ...]
    biases: tuple[str, ...]
    used: int
    locks: tuple[Lock, ...] = ()

    @property
    def name(self) -> str:
        """Of the group."""
        return f"{self.path}/expert" if self.path else "experts/expert"


def find_mixtures(model: nn.Module, record: Trace, found: Structure, protect: Sequence[str] = ()) -> list[Mixture]:
    """Find blocks whose experts can be removed, and make one index set of each block's expert dimensions.

    Args:
        model: the captured model.
        record: of `capture`; its expert dimensions are united.
        found: from `structure(model, record)`; it gets a group per block, named in its `atoms`.
        protect: as in `structure`.

    Returns:
        the blocks, in order, with the locks that stay.
    """
    guarded = protected_tensors(model, found.tensors, protect)
    fused = _fused(model, found.tensors)
    nearest = [_block(found, path, size, fused) for path, size in fused]
    blocks = list({(b[0], b[1]): b for b in nearest if b is not None}.values())
    merged: list[tuple[Block, list[Atom], list[str]]] = []
    for block in blocks:
        _, size, experts, routers = block
        biases = [n for n, axes in found.tensors.items() if _is_bias(axes, routers, found)]
        merged.append((block, _atoms(found, size, experts, routers), biases))
    # Before the atoms are united, which hands the locks of each on to all of them.
    stays = [[lock for atom in atoms for lock in atom.locks if not _lifted(lock)] for _, atoms, _ in merged]
    for _, atoms, _ in merged:
        for other in atoms[1:]:
            record.space.unify(atoms[0], other)
    ends = [resolve(atoms[0]) for _, atoms, _ in merged]
    mixtures: list[Mixture] = []
    for ((path, size, _, routers), _, biases), locks, atom in zip(merged, stays, ends, strict=True):
        assert isinstance(atom, Atom)
        places = [n for n, axes in found.tensors.items() if any(atom in leaves(axis) for axis in axes)]
        locks += [guarded[name] for name in places if name in guarded]
        if ends.count(atom) > 1:
            locks.append(Lock("the routers of several blocks meet in one tensor", module=path))
        locks += mixed(record, atom)
        used = _used(model, record, path)
        mixtures.append(Mixture(path, size, atom, tuple(routers), tuple(biases), used, tuple(dict.fromkeys(locks))))
    parameters = {name for name, _ in model.named_parameters()}
    for mixture in mixtures:
        found.atoms[mixture.name] = mixture.atom
        found.groups.append(_group(found, mixture, parameters))
    return mixtures


Block = tuple[str, int, list[str], list[str]]  # module, experts, weights of experts, of routers


def _fused(model: nn.Module, tensors: Mapping[str, Sequence[Axis]]) -> list[tuple[str, int]]:
    """(module, experts) of every module that holds weights of three dimensions whose first is addressed by number."""
    found = []
    for name, axes in tensors.items():
        atom = resolve(axes[0]) if len(axes) >= 3 else None
        home = name.rpartition(".")[0]
        if isinstance(model.get_submodule(home), nn.modules.conv._ConvNd) or not isinstance(atom, Atom):
            continue
        if any(_lifted(lock) for lock in atom.locks):
            found.append((home, atom.size))
    return list(dict.fromkeys(found))


def _block(found: Structure, home: str, size: int, fused: Sequence[tuple[str, int]]) -> Block | None:
    """The nearest module around the experts that holds one router for them."""
    path = home
    while True:
        inside = [n for n in found.tensors if not path or n.startswith(f"{path}.")]
        routers = [n for n in inside if _is_router(found.tensors[n], size)]
        if routers:
            ranked = {id(resolve(a)) for n in routers for a in found.tensors[n] if _ranked([a], size)}
            homes = {other for other, count in fused if count == size}
            experts = [n for n in inside if n.rpartition(".")[0] in homes and n not in routers]
            # Several rankings: two blocks of as many experts, and nothing says which router deals out which.
            return (path, size, experts, routers) if len(ranked) == 1 else None
        if not path:
            return None
        path = path.rpartition(".")[0]


def _is_router(axes: Axes, size: int) -> bool:
    return len(axes) == 2 and min(axis.size for axis in axes) > 1 and _ranked(axes, size)


def _ranked(axes: Sequence[Axis], size: int) -> bool:
    """Whether some dimension is ranked by the router: `topk` and the like gave its positions as numbers."""
    whole = [a for a in map(resolve, axes) if isinstance(a, Atom) and a.size == size]
    return any(RANKING.search(reason.op) for atom in whole for reason in atom.locks)


def _atoms(found: Structure, size: int, experts: Sequence[str], routers: Sequence[str]) -> list[Atom]:
    """The expert dimension as each tensor has it."""
    atoms: dict[int, Atom] = {}
    for name in experts:
        node = resolve(found.tensors[name][0]) if found.tensors[name] else None
        if isinstance(node, Atom) and node.size == size and any(_lifted(lock) for lock in node.locks):
            atoms[node.id] = node
    for name in routers:
        for axis in found.tensors[name]:
            node = resolve(axis)
            if isinstance(node, Atom) and _ranked([node], size):
                atoms[node.id] = node
    return list(atoms.values())


def _is_bias(axes: Axes, routers: Sequence[str], found: Structure) -> bool:
    """Whether a tensor holds one number per expert of the router."""
    wide = [resolve(axis) for axis in axes if axis.size > 1]
    return len(wide) == 1 and any(
        resolve(a) is wide[0] for n in routers for a in found.tensors[n] if _ranked([a], wide[0].size)
    )


def _lifted(reason: Lock) -> bool:
    return any(text in reason.reason for text in LIFTED)


def _used(model: nn.Module, record: Trace, path: str) -> int:
    """How many experts a token needs: the largest `topk` of the block, and what its modules say."""
    ks = [1]
    for step in record.steps:
        inside = not path or f"{step.place.module}.".startswith(f"{path}.")
        if inside and str(step.func).startswith("aten.topk") and isinstance(step.args[1], int):
            ks.append(int(step.args[1]))
    for value in (v for m in model.get_submodule(path).modules() for k, v in vars(m).items() if k in ("top_k", "topk")):
        ks += [value] if type(value) is int else []
    return max(ks)


def _group(found: Structure, mixture: Mixture, parameters: Set[str]) -> Group:
    spans = []
    for name, axes in found.tensors.items():
        for d, axis in enumerate(axes):
            for index in unit_index(axis, mixture.atom):
                shape = [1] * len(axes)
                shape[d] = axis.size
                role = "out" if len(axes) > 1 else "bias" if "bias" in name.rpartition(".")[2] else "scale"
                role = role if name in parameters else "state"
                spans.append(Span(name, torch.from_numpy(np.ascontiguousarray(index)).view(shape), role))
    # Experts before routers before biases: the first that makes the unit is the layer that reports speak of.
    spans.sort(key=lambda span: -len(found.tensors[span.tensor]))
    return Group(mixture.name, "expert", (mixture.size,), tuple(spans), mixture.locks, {"used": mixture.used})


def expert_counts(
    model: nn.Module, found: Structure, mixtures: Sequence[Mixture], left: Mapping[int, int]
) -> dict[Attribute, int]:
    """Integers that say how many experts there are, and what they become.

    Args:
        model: the original.
        found: its structure.
        mixtures: the blocks that are cut.
        left: experts before -> experts after, the same for every block of that size.
    """
    changed = {}
    rest = {size for home, size in _fused(model, found.tensors) if not any(_within(home, m) for m in mixtures)}
    for owner, name, value in _integers(model):
        if value in left and is_count(name):
            inside = [m for m in mixtures if _within(owner, m)]
            # A config stands above all blocks: its number can follow only where every block of that size is cut.
            if any(m.size == value for m in inside) if inside else value not in rest:
                changed[Attribute(owner, name)] = left[value]
    return changed


def _within(path: str, mixture: Mixture) -> bool:
    return not mixture.path or f"{path}.".startswith(f"{mixture.path}.")


def _integers(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    for path, owner in owners(model):
        for name, value in vars(owner).items():
            if type(value) is int:
                yield path, name, value


def split_routers(found: Structure, model: nn.Module) -> list[str]:
    """Routers that deal their experts out in groups of fixed size, which a removal would mix up."""
    names = []
    for home, size in _fused(model, found.tensors):
        around = home.rpartition(".")[0]
        for name, axes in found.tensors.items():
            if name.startswith(f"{around}.") and len(axes) == 2 and axes[0].size == size:
                names += [] if isinstance(resolve(axes[0]), Atom) else [name]
    return names
