"""Two removals that follow each other as one, named and numbered as in the first model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import get_args

import torch
from torch import nn

from secateur.errors import PlanMismatchError
from secateur.kinds.edit import Edit
from secateur.kinds.layers.drop import Layers, block_names, kept_places, old_names, stub_names, with_stubs
from secateur.kinds.slices.fold import composed_scales
from secateur.model.tensors import cut_tensor
from secateur.request import Efforts
from secateur.structure.provenance import Attribute
from secateur.types import Certificate, LayerEntry, Removal, Trial
from secateur.words import SLICES


def composed_edit(first: Edit, second: Edit, between: nn.Module) -> Edit:
    """One edit that does what both do.

    Args:
        first: an edit of the first model.
        second: an edit of the model that `first` leaves.
        between: that model, or one of the same names and shapes.
    """
    back = old_names(between, first.layers)
    layers = _layers(first.layers, second.layers, between)
    gone = tuple(f"{back(name)}." for name in (*block_names(between, second.layers), *stub_names(second.layers)))

    def stays(name: str) -> bool:
        """Whether the second step leaves the block or branch that holds this."""
        return not f"{name}.".startswith(gone)

    cuts = {name: dict(dims) for name, dims in first.cuts.items() if stays(name)}
    for new, dims in second.cuts.items():
        name = back(new)
        for d, kept in dims.items():
            before = cuts.setdefault(name, {}).get(d)
            cuts[name][d] = kept if before is None else before[kept]
    later = {back(new): dims for new, dims in second.cuts.items()}
    masks = {name: cut_tensor(mask, later.get(name, {})) for name, mask in first.masks.items() if stays(name)}
    for new, mask in second.masks.items():
        name = back(new)
        masks[name] = masks[name] & mask if name in masks else mask
    weights = {name: cut_tensor(value, later.get(name, {})) for name, value in first.weights.items() if stays(name)}
    weights.update({back(new): value for new, value in second.weights.items()})
    attributes = {a: value for a, value in first.attributes.items() if stays(a.owner)}
    attributes.update({Attribute(back(a.owner), a.name, a.item): value for a, value in second.attributes.items()})
    # What a cut has not changed was so before it; where one has, the first edit knows what it relied on itself.
    sizes = {} if first.cuts else {Attribute(back(a.owner), a.name, a.item): v for a, v in second.sizes.items()}
    shortened = {(owner, name) for entry in first.layers.values() for owner, name in entry["lists"]}
    same = {a: v for a, v in sizes.items() if a not in first.attributes and (a.owner, a.name) not in shortened}
    renamed = [replace(scale, tensor=back(scale.tensor)) for scale in second.scales]
    scales = composed_scales([s for s in first.scales if stays(s.tensor)], renamed, first.cuts)
    return Edit(cuts, attributes, layers, masks, {**same, **first.sizes}, scales, weights)


def _layers(first: Layers, second: Layers, between: nn.Module) -> dict[str, LayerEntry]:
    back = old_names(between, first)
    gone = tuple(f"{back(name)}." for name in block_names(between, second))
    # A stack inside a block that goes later goes with it.
    # So do branches of such blocks.
    result = {path: _without(entry, gone) for path, entry in first.items() if not f"{path}.".startswith(gone)}
    for new, entry in second.items():
        path = back(new)
        lists = [[back(owner), name] for owner, name in entry["lists"]]
        stubs = {back(name): stub for name, stub in entry.get("stubs", {}).items()}
        if path not in result:
            result[path] = with_stubs(entry["size"], list(entry["removed"]), lists, stubs)
            continue
        before = result[path]
        places = kept_places(before)
        if len(places) != entry["size"]:
            raise PlanMismatchError(f"The plans disagree about the number of blocks of {path!r}.")
        before["removed"] = sorted([*before["removed"], *(places[i] for i in entry["removed"])])
        before["lists"] = before["lists"] + [pair for pair in lists if pair not in before["lists"]]
        if stubs:
            before["stubs"] = {**before.get("stubs", {}), **stubs}
    return {path: entry for path, entry in result.items() if entry["removed"] or entry.get("stubs")}


def _without(entry: LayerEntry, gone: tuple[str, ...]) -> LayerEntry:
    stubs = {name: stub for name, stub in entry.get("stubs", {}).items() if not f"{name}.".startswith(gone)}
    return with_stubs(entry["size"], list(entry["removed"]), list(entry["lists"]), stubs)


def composed_groups(
    first: Mapping[str, Removal], second: Mapping[str, Removal], layers: Layers, between: nn.Module
) -> dict[str, Removal]:
    """What goes from every group in both steps, numbered as in the first.

    A group that only the second model knows (dimensions of a head where one head is left are its features) stands
    under a name of its own, numbered as there. The edit does not depend on any of this: it goes by tensors.
    """
    back, before = old_names(between, layers), _before_it_moved_up(first)
    result: dict[str, Removal] = {name: Removal(**group) for name, group in first.items()}
    for new, group in second.items():
        name = before(back(new))
        stays = _left(result[name]) if name in result else []
        if len(stays) == group["size"] and result[name]["granularity"] == group["granularity"]:
            gone = {stays[i] for i in group["removed"]}
            result[name]["removed"] = sorted({*result[name]["removed"], *gone})
            continue
        base, number = _numbered(name)
        names = (_name(base, number + i) for i in count())
        result[next(name for name in names if name not in result)] = Removal(**group)
    return result


def _before_it_moved_up(first: Mapping[str, Removal]) -> Callable[[str], str]:
    """From names of groups after a step to those before: one unit is no group any more, and the next takes its name."""
    gone: dict[str, list[int]] = defaultdict(list)
    for name, group in first.items():
        if group["granularity"] in SLICES and len(_left(group)) == 1:
            base, number = _numbered(name)
            gone[base].append(number)

    def before(name: str) -> str:
        base, number = _numbered(name)
        for place in sorted(gone.get(base, ())):
            number += place <= number
        return _name(base, number)

    return before


def _left(group: Removal) -> list[int]:
    gone = set(group["removed"])
    return [i for i in range(group["size"]) if i not in gone]


def _numbered(name: str) -> tuple[str, int]:
    base, _, number = name.rpartition("#")
    return (base, int(number)) if base and number.isdecimal() else (name, 1)


def _name(base: str, number: int) -> str:
    return base if number == 1 else f"{base}#{number}"


def composed_cost(first: Mapping[str, list[int]], second: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Before the first step and after the second; masks have no costs of their own and leave them as they are."""
    names = sorted({*first, *second})
    return {n: [(first.get(n) or second[n])[0], (second.get(n) or first[n])[1]] for n in names}


IN_PART = "composed, in part as a file records it"


def composed_record(steps: Sequence[tuple[Certificate | None, Certificate | None]]) -> Certificate | None:
    """What is said of steps that were not all proved here.

    Args:
        steps: (certificate, what a file records) of each.

    Returns:
        the sum, marked as a record; None where all were proved, or one has neither.
    """
    if all(proof is not None for proof, _ in steps):
        return None
    said = composed_certificate([proof if proof is not None else record for proof, record in steps])
    return None if said is None else replace(said, method=IN_PART if len(steps) > 1 else said.method)


def composed_certificate(proofs: Sequence[Certificate | None]) -> Certificate | None:
    """The proof of steps that follow each other: errors add up, and so do the tolerances they were held to."""
    known = [proof for proof in proofs if proof is not None]
    if not known or len(known) < len(proofs):
        return None
    return Certificate(
        max_abs_error=sum(proof.max_abs_error for proof in known),
        tolerance=sum(proof.tolerance for proof in known),
        dtype=min((proof.dtype for proof in known), key=lambda dtype: torch.finfo(getattr(torch, dtype)).bits),
        method="composed" if len(known) > 1 else known[0].method,
        outputs=known[-1].outputs,
        trials=_composed_trials([proof.trials for proof in known]),
        notes=tuple(dict.fromkeys(note for proof in known for note in proof.notes)),
        effort=min((proof.effort for proof in known), key=get_args(Efforts).index),
    )


def _composed_trials(steps: Sequence[Sequence[Trial]]) -> tuple[Trial, ...]:
    """Inputs that every step was tried on."""
    found = [{trial.input: trial for trial in trials} for trials in steps]
    shared = [name for name in found[0] if all(name in trials for trials in found)]
    return tuple(
        Trial(name, " and ".join(dict.fromkeys(t[name].method for t in found)), sum(t[name].error for t in found))
        for name in shared
    )
