"""Slices of coupled tensors: channels, neurons, heads, head dimensions, groups of convolutions, several at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import lcm

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.integrations.transformers import is_native
from secateur.kinds.base import Candidates, Keep, Left
from secateur.kinds.edit import Edit
from secateur.kinds.expressible import FieldFamilies, require_native
from secateur.kinds.reference import Tried, agrees, runs
from secateur.kinds.shallow import repeated
from secateur.kinds.slices.ablation import ablated, ablated_with_widths
from secateur.kinds.slices.anew import lock_computed
from secateur.kinds.slices.both import with_replay
from secateur.kinds.slices.certify import certify
from secateur.kinds.slices.encoders import with_padding
from secateur.kinds.slices.fold import Scale, fold, rescale
from secateur.kinds.slices.inside import agrees_inside
from secateur.kinds.slices.number_tape import NumberTape
from secateur.kinds.slices.unmade import SameSlices
from secateur.kinds.trials import tried
from secateur.measure.macs import samples_in
from secateur.model.agreement import doubled
from secateur.model.call import device_of
from secateur.model.tensors import named_tensors
from secateur.request import PROOF, Efforts, Request
from secateur.structure.attributes import edits, relied_on
from secateur.structure.axes import leaves
from secateur.structure.capture import capture
from secateur.structure.chosen import chosen
from secateur.structure.cost import CostModel
from secateur.structure.fronts import fronts
from secateur.structure.groups import Structure, structure
from secateur.structure.provenance import Attribute
from secateur.structure.reckoned import reckoned
from secateur.structure.summaries import summarised
from secateur.structure.trace import Trace
from secateur.types import Certificate, Condition, Example, Group


@dataclass(frozen=True, eq=False)
class Decision:
    """Kept units in every form that somebody needs."""

    atoms: dict[int, npt.NDArray[np.bool_]]
    counts: dict[int, int]
    cuts: dict[str, dict[int, Tensor]]
    attributes: dict[Attribute, int]


class Slices(Candidates):
    """Free index sets of a captured model, of one granularity or of several in one ranking."""

    trace: Trace
    structure: Structure

    def __init__(self, model: nn.Module, example: Example, request: Request, examples: Sequence[Example] = ()) -> None:
        super().__init__(model, example, request, examples)
        self.trace = capture(model, example, examples=self.examples)
        self.structure = structure(model, self.trace, request.protect)
        self.native: FieldFamilies | None = None
        self.conditions = lock_computed(model, example, self.trace, self.structure)
        self.groups = self._found()
        self.cost = CostModel(model, self.trace, samples_in(model, example))
        self.ids = {group.name: self.structure.atoms[group.name].id for group in self.groups}
        if request.expressible and not self.native:
            self._tie_to_config()

    def _found(self) -> list[Group]:
        found: dict[str, Group] = {}
        for choice in self.request.granularity:
            found.update((group.name, group) for group in self.structure.free(choice.name))
        if not found:
            kinds = sorted({g.granularity for g in self.structure.groups if not g.locks})
            free = f"free are only: {', '.join(kinds)}" if kinds else "everything is locked"
            raise UnsupportedError(
                f"Nothing of {type(self.model).__name__} can be cut at granularity {self.request.what!r}.",
                why="; ".join([free, *self.locks()[:3]]),
                hint="See `secateur inspect` for what is locked, by which line, and what to do about it.",
            )
        return list(found.values())

    def _tie_to_config(self) -> None:
        self.native = FieldFamilies(self.model, self.structure, self.groups, self.request, self._builds)
        members = {name for family in self.native.families for name in family.groups}
        self.groups = [group for group in self.groups if group.name in members]
        self.families = self.native.families

    def _builds(self, names: tuple[str, ...], count: int, attributes: Mapping[Attribute, int]) -> bool:
        """Whether these groups cut to this count are the model that these integers of the config build."""
        generator = torch.Generator().manual_seed(count)
        size = self.structure.atoms[names[0]].size
        choice = self.decision({name: torch.randperm(size, generator=generator) < count for name in names})
        trial = Edit(choice.cuts, {**choice.attributes, **attributes}).copy(self.model)
        return is_native(trial, trial.config, self.example)

    def grid(self, group: Group) -> int:
        """As in the base, and a multiple of what coupled dimensions need."""
        multiple: int = group.attributes.get("multiple", 1)
        return lcm(super().grid(group), multiple)

    def price(self, what: str, left: Left) -> int:
        """From the trace alone: no model is built."""
        counts = {self.ids[name]: n for name, n in left.counts.items()}
        measures = {"params": self.cost.params, "macs": self.cost.macs, "memory_bytes": self.cost.bytes}
        return measures[what](counts)

    def decision(self, keep: Keep) -> Decision:
        """Slices and attributes of a choice."""
        atoms = self._atoms(keep)
        counts = {i: int(mask.sum()) for i, mask in atoms.items()}
        return Decision(atoms, counts, self.structure.cuts(atoms), edits(self.model, self.trace, counts))

    def _atoms(self, keep: Keep) -> dict[int, npt.NDArray[np.bool_]]:
        return {self.ids[name]: mask.cpu().numpy() for name, mask in keep.items() if not bool(mask.all())}

    def write(self, keep: Keep) -> Edit:
        """Kept indices per tensor dimension, and the integers that follow."""
        return self._edit(self.decision(keep))

    def about(self, keep: Keep, edit: Edit) -> Sequence[Condition]:
        """Numbers made of sizes that are cut or that choose what is done to units, and outputs that sum units up."""
        cut = {name: self.ids[name] for name, mask in keep.items() if not bool(mask.all())}
        return (
            *reckoned(self.trace, cut, edit.attributes),
            *summarised(self.trace, cut, edit.attributes),
            *chosen(self.trace.chosen, cut.values()),
            *fronts(self.trace.fronts, cut.values(), self.model, self.example),
        )

    def _edit(self, choice: Decision) -> Edit:
        config = {} if self.native is None else self.native.attributes(choice.counts)
        sizes = relied_on(self.trace, choice.atoms)
        edit = Edit(choice.cuts, {**choice.attributes, **config}, sizes=sizes)
        return replace(edit, scales=self._scales(edit, choice))

    def _scales(self, edit: Edit, choice: Decision) -> tuple[Scale, ...]:
        """Factors for coordinates of products of two activations, by whose number the code may scale the product."""
        inner = {atom.id for axis in self.trace.inner for atom in leaves(axis)}
        atoms = {group.name: self.structure.atoms[group.name] for group in self.groups}
        cut = [
            (g, atoms[g.name], choice.counts[atoms[g.name].id])
            for g in self.groups
            if atoms[g.name].id in choice.counts
        ]
        cut = [each for each in cut if each[1].id in inner]
        if not cut or self.request.scales == "follow" or device_of(self.model).type == "meta":
            return ()
        # In double, and without autocast: a scale that changes by a tenth may change the outputs by less than rounding.
        whole, example = doubled(self.model), doubled(self.example)
        if not runs(ablated(whole, choice.cuts), example):  # a mask of single precision that is added to products, say
            whole, example = self.model, self.example
        trial = edit.copy(whole)
        tensors, reference = named_tensors(trial), ablated(whole, choice.cuts)

        def holds(right: Callable[[nn.Module], bool], scales: tuple[Scale, ...]) -> bool:
            before = {scale.tensor: tensors[scale.tensor].detach().clone() for scale in scales}
            rescale(tensors, scales, choice.cuts)
            try:
                return right(trial)
            finally:
                for name, values in before.items():
                    tensors[name].detach().copy_(values)

        # Inside first: outputs may hide a scale. A width that is averaged over may differ inside and not in the end.
        for right in (agrees_inside(reference, example), agrees(reference, example)):
            found = fold(self.model, cut, self.structure.tensors, partial(holds, right))
            if found is not None:
                return found
        return ()  # the plan is made all the same: the proof says what differs

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
        """By replay of the original's calls with the removed parts poisoned, and by running it without them."""
        choice = self.decision(keep)
        scales = (edit or self._edit(choice)).scales
        same = SameSlices(whole, cut, choice.cuts, frozenset(scale.tensor for scale in scales))
        references = [
            partial(ablated, cuts=choice.cuts, same=same),
            partial(
                ablated_with_widths,
                cuts=choice.cuts,
                attributes=choice.attributes,
                follow=self.request.scales == "follow",
                same=same,
            ),
        ]
        blocks = repeated(whole, choice.cuts)

        def trials(replayed: bool) -> Tried:
            return tried(
                references, whole, cut, self.example, examples=self.examples, dtype=dtype, tolerance=tolerance,
                effort=effort, beside=NumberTape, blocks=blocks, replayed=replayed,
            )  # fmt: skip

        replay = partial(
            certify, whole, cut, self.example, self.trace, choice.atoms,
            scales=scales, follow=self.request.scales == "follow", examples=self.examples, same=same,
        )  # fmt: skip
        proof = with_replay(trials, replay, dtype=dtype, tolerance=tolerance, alone=effort == "example")
        meta = device_of(whole).type == "meta"
        proof = with_padding(proof, whole, cut, [self.example, *self.examples], meta=meta)
        if self.request.expressible:
            require_native(cut, self.example)
        return proof
