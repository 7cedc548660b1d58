"""From a trace to groups: which atoms can be cut, what they are called, and every slice that goes with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.model.modules import named_parameters
from secateur.model.protect import protected
from secateur.model.tensors import named_tensors
from secateur.structure.attributes import settle
from secateur.structure.axes import Atom, kept, leaves, lock, resolve, unit_index
from secateur.structure.trace import Axes, Trace
from secateur.types import Group, Lock, Span

KERNEL = "the kernel's extent"
DATA = "no weight of a product has this dimension: what lies along it are positions, tokens or other data"
ROWS = "weights are applied to each position of this dimension and none sums it up: learned queries or slots, not units"
EXPERTS = "products with weights run side by side over this dimension: its positions are experts, not channels"
SCALES = ("running_mean", "running_var")


@dataclass(eq=False, repr=False)
class Structure:
    """What the engine knows about a model.

    Args:
        trace: the run it was learned from.
        atoms: group name -> atom.
        groups: every index set that lives in some parameter, free or locked.
        tensors: parameter or buffer name -> dimensions.
    """

    trace: Trace
    atoms: dict[str, Atom] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    tensors: dict[str, Axes] = field(default_factory=dict)

    def free(self, granularity: str) -> list[Group]:
        """Groups of a granularity that may be cut. "channel" includes the neurons of linear layers."""
        wanted = ("channel", "neuron") if granularity == "channel" else (granularity,)
        return [g for g in self.groups if g.granularity in wanted and not g.locks]

    def cuts(self, stays: Mapping[int, npt.NDArray[np.bool_]]) -> dict[str, dict[int, Tensor]]:
        """What is left of every tensor.

        Args:
            stays: id of an atom -> which of its units stay; atoms that are left out stay whole.

        Returns:
            tensor name -> dimension -> kept indices, of the dimensions that lose any.
        """
        cuts: dict[str, dict[int, Tensor]] = {}
        # The same few dimensions occur in many tensors: their kept indices are looked for once, and are one tensor.
        known: dict[int, Tensor | None] = {}
        for name, axes in self.tensors.items():
            for d, axis in enumerate(map(resolve, axes)):
                if id(axis) not in known:
                    mask = kept(axis, stays)
                    known[id(axis)] = None if mask.all() else torch.from_numpy(np.flatnonzero(mask))
                found = known[id(axis)]
                if found is not None:
                    cuts.setdefault(name, {})[d] = found
        return cuts


def structure(model: nn.Module, trace: Trace, protect: Sequence[str] = ()) -> Structure:
    """Find the groups of a captured model.

    Args:
        model: the captured model.
        trace: from `capture`.
        protect: patterns of module or parameter names, or "type:ClassName", that nothing is cut from:
            neither outputs nor inputs.

    Returns:
        the groups, largest producers first named after the module that makes the units.

    Raises:
        RecipeError: a pattern of `protect` matches nothing.
    """
    tensors = trace.tensors()
    # Before the sizes are settled, which unites free dimensions only.
    _lock_alternatives(trace)
    settle(trace, [a for axes in tensors.values() for axis in axes for a in leaves(axis)])
    places: dict[int, list[tuple[str, int]]] = defaultdict(list)
    atoms: dict[int, Atom] = {}
    for name, axes in tensors.items():
        for d, axis in enumerate(axes):
            for atom in leaves(axis):
                atoms[atom.id] = atom
                if (name, d) not in places[atom.id]:
                    places[atom.id].append((name, d))
    found = Structure(trace, tensors=tensors)
    # The extent of a kernel holds no units, and among what is locked it would only be noise.
    atoms = {i: a for i, a in atoms.items() if not any(KERNEL in r.reason for r in a.locks)}
    guarded = protected_tensors(model, tensors, protect)
    heads = {a.id for axis in trace.heads for a in leaves(axis)}
    inner = {a.id for axis in trace.inner for a in leaves(axis)} - heads
    widths, parallel = ({a.id for axis in found for a in leaves(axis)} for found in (trace.widths, trace.parallel))
    rows, summed = ({a.id for axis in found for a in leaves(axis)} for found in (trace.rows, trace.summed))
    weights = {name for name, _ in named_parameters(model)}
    used: Counter[str] = Counter()
    order = {name: i for i, name in enumerate(named_tensors(model))}
    # In the model's order, so that a group that shares its name gets the same number in every process.
    for atom in sorted(atoms.values(), key=lambda a: (min(order[n] for n, _ in places[a.id]), bool(a.locks))):
        spans = _spans(trace, tensors, places[atom.id], atom)
        kind = _kind(tensors, places[atom.id], atom, heads, inner, spans)
        base = _title(spans)
        base = base if kind in ("channel", "neuron") else f"{base}/{kind}"
        used[base] += 1
        name = base if used[base] == 1 else f"{base}#{used[base]}"
        locks = list(atom.locks)
        locks += [reason for place, reason in guarded.items() if place in {s.tensor for s in spans}]
        if not any(span.tensor in weights for span in spans):
            # A table of positions, for example: no criterion can say what its entries are worth.
            locks.append(Lock("only buffers have this dimension, no weight"))
        elif atom.id not in widths:
            locks.append(Lock(DATA))
        elif atom.id in rows - summed:
            locks.append(Lock(ROWS))
        elif atom.id in parallel and kind == "channel" and _stands_alone(tensors, places[atom.id], atom):
            locks.append(Lock(EXPERTS, hint='whole experts are units of granularity "expert"'))
        constraints = {"multiple": atom.multiple} if atom.multiple > 1 else {}
        found.atoms[name] = atom
        found.groups.append(Group(name, kind, (atom.size,), tuple(spans), tuple(locks), constraints))
    return found


def _lock_alternatives(trace: Trace) -> None:
    """Lock what a softmax runs over, but for hidden units: a layer makes them, and another one sums them up."""
    made, consumed, other = (
        {atom.id for axis in axes for atom in leaves(axis)}
        for axes in (trace.made, trace.consumed, (*trace.heads, *trace.inner, *trace.parallel, *trace.rows))
    )
    for axis, reason in trace.competing:
        atom = resolve(axis)
        if not isinstance(atom, Atom) or atom.id not in (made & consumed) - other:
            lock(axis, reason)


def protected_tensors(model: nn.Module, tensors: Iterable[str], patterns: Sequence[str]) -> dict[str, Lock]:
    """The tensors that patterns protect, with the reason; refuses a pattern that matches nothing."""
    found = protected(model, patterns)
    if not found:
        return {}
    named = named_tensors(model)
    return {name: Lock(f"protected by {found[id(named[name])]!r}") for name in tensors if id(named[name]) in found}


def _spans(trace: Trace, tensors: Mapping[str, Axes], places: Sequence[tuple[str, int]], atom: Atom) -> list[Span]:
    spans = []
    for name, d in places:
        axes = tensors[name]
        for index in unit_index(axes[d], atom):
            shape = [1] * len(axes)
            shape[d] = axes[d].size
            spans.append(Span(name, torch.from_numpy(index.reshape(shape)), _role(trace, name, d, len(axes))))
    return spans


def _role(trace: Trace, name: str, d: int, rank: int) -> str:
    known = trace.roles.get((name, d))
    if known:
        return known
    leaf = name.rpartition(".")[2]
    if leaf in SCALES:
        return "state"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    return "scale" if rank == 1 or leaf in ("weight_g", "original0") else "out"


def _kind(
    tensors: Mapping[str, Axes],
    places: Sequence[tuple[str, int]],
    atom: Atom,
    heads: set[int],
    inner: set[int],
    spans: Sequence[Span],
) -> str:
    mates = {a.id for n, d in places for a in leaves(tensors[n][d])} - {atom.id}
    if atom.id in heads:
        return "head"
    if atom.id in inner and mates & heads and not _runs_through(tensors, places):
        return "head_dim"
    producers = [len(tensors[s.tensor]) for s in spans if s.role == "out"]
    outer = not _is_whole(tensors, spans, atom) and any(_is_outer(tensors[n][d], atom) for n, d in places)
    if mates and producers and max(producers) > 2 and outer:
        return "conv_group"
    return "neuron" if producers and max(producers) <= 2 else "channel"


def _runs_through(tensors: Mapping[str, Axes], places: Sequence[tuple[str, int]]) -> bool:
    """Whether an atom is in the input and in the output of one weight: then it is the width of a residual stream."""
    matrices = Counter(name for name, _ in places if len(tensors[name]) > 1)
    return any(count > 1 for count in matrices.values())


def _stands_alone(tensors: Mapping[str, Axes], places: Sequence[tuple[str, int]], atom: Atom) -> bool:
    """Whether an atom is a dimension of its own wherever it occurs: blocks of a width are a factor of it somewhere."""
    return all(resolve(tensors[name][d]) is atom for name, d in places)


def _is_whole(tensors: Mapping[str, Axes], spans: Sequence[Span], atom: Atom) -> bool:
    """Whether some producer makes the units of an atom and nothing else: then they are its channels."""
    made = [(s.tensor, d) for s in spans if s.role == "out" and s.index is not None for d in _wide(s.index)]
    return any(resolve(tensors[name][d]) is atom for name, d in made)


def _wide(index: torch.Tensor) -> list[int]:
    return [d for d, n in enumerate(index.shape) if n > 1]


def _is_outer(axis: object, atom: Atom) -> bool:
    from secateur.structure.axes import Prod

    node = resolve(axis)  # type: ignore[arg-type]
    if not isinstance(node, Prod) or len(node.parts) < 2 or resolve(node.parts[0]) is not atom:
        return False
    return any(not leaf.locks for part in node.parts[1:] for leaf in leaves(part))


def _title(spans: Sequence[Span]) -> str:
    first = next((s for s in spans if s.role == "out"), spans[0])
    module, _, leaf = first.tensor.replace("parametrizations.", "").rpartition(".")
    if leaf.startswith("original"):
        module, _, leaf = module.rpartition(".")
    return module if leaf in ("weight", "original1", "original0") and module else first.tensor
