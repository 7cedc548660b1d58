"""What `inspect` shows: the groups with their sizes and costs, and what is locked, by what, at which line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from secateur import shown
from secateur.measure.macs import samples_in
from secateur.model.samples import batch_size_of
from secateur.structure.capture import capture
from secateur.structure.cost import CostModel
from secateur.structure.grouped import grouped
from secateur.structure.groups import Structure, structure
from secateur.structure.page import structure_page
from secateur.structure.parts import ModulePart, module_parts
from secateur.structure.trace import Trace
from secateur.structure.usual import aside
from secateur.types import Condition, Example, Group, MacsPer


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """The structure of a model as a person reads it.

    Args:
        model: its class name.
        params: its parameters.
        macs: multiply-accumulates of one forward pass for one sample.
        groups: what can be cut.
        locked: what cannot, each with its reasons.
        weights: group name -> parameters that go with all its units.
        macs_per: "sample", or "example" where the example's leading dimension holds no samples.
        conditions: what the run depended on.
        parts: modules with weights, in the model's order.
    """

    model: str
    params: int
    macs: int
    groups: tuple[Group, ...]
    locked: tuple[Group, ...]
    weights: dict[str, int]
    macs_per: MacsPer = "sample"
    conditions: tuple[Condition, ...] = ()
    parts: tuple[ModulePart, ...] = ()

    def html(self) -> str:
        """A page that draws the network: which slices hang together, and what is locked by what.

        Returns:
            HTML that opens offline and asks the network for nothing; write it as UTF-8.
        """
        return structure_page(
            self.parts,
            self.groups,
            self.locked,
            model=self.model,
            params=self.params,
            macs=self.macs,
            macs_per=self.macs_per,
            weights=self.weights,
            conditions=grouped(self.conditions),
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {
            "model": self.model,
            "params": self.params,
            "macs": self.macs,
            "macs_per": self.macs_per,
            "groups": [
                {
                    "name": g.name,
                    "granularity": g.granularity,
                    "units": g.size,
                    "params": self.weights[g.name],
                    "tensors": [{"name": s.tensor, "role": s.role} for s in g.spans],
                }
                for g in self.groups
            ],
            "locked": [
                {
                    "name": g.name,
                    "granularity": g.granularity,
                    "units": g.size,
                    "params": self.weights[g.name],
                    "tensors": [{"name": s.tensor, "role": s.role} for s in g.spans],
                    "reasons": [asdict(reason) for reason in g.locks],
                }
                for g in self.locked
            ],
            "conditions": [asdict(condition) for condition in self.conditions],
        }

    def __repr__(self) -> str:
        free = f"{len(self.groups)} groups can be cut"
        return shown.line("View", self.model, f"{self.params:,} parameters", free, f"{len(self.locked)} are locked")

    def _repr_html_(self) -> str:
        title = f"{self.model}: {self.params:,} parameters, {self.macs:,} MACs per {self.macs_per}"
        free = [(g.name, f"{g.size} {g.granularity}", f"{self.weights[g.name]:,}", "can be cut") for g in self.groups]
        held = [
            (g.name, f"{g.size} {g.granularity}", f"{self.weights[g.name]:,}", f"locked: {g.locks[0].reason}")
            for g in self.locked
        ]
        notes = [f"condition: {condition}" for condition in self.conditions]
        return shown.table(title, ("group", "units", "parameters", ""), [*free, *held], notes=notes)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.params:,} parameters, {self.macs:,} MACs per {self.macs_per}", "can be cut:"]
        lines += [
            f"  {g.name}  {g.size} {g.granularity} units, {self.weights[g.name]:,} parameters,"
            f" {len({s.tensor for s in g.spans})} tensors"
            for g in self.groups
        ] or ["  nothing"]
        usual = aside(g.locks[0] for g in self.locked)
        lines.append(f"locked ({usual}):" if self.locked and usual else "locked:")
        for g in self.locked:
            reason = g.locks[0]
            where = " ".join(part for part in (reason.op, reason.where and f"at {reason.where}") if part)
            lines.append(f"  {g.name}  {g.size} units, {self.weights[g.name]:,} parameters: {reason.reason}")
            lines += [f"    {where}"] if where else []
            lines += [f"    do: {reason.hint}"] if reason.hint else []
        lines += ["conditions:", *(f"  {line}" for line in grouped(self.conditions))] if self.conditions else []
        return "\n".join(lines)


Locked = Callable[[nn.Module, Example, Trace, Structure], Sequence[Condition]]


def look(
    model: nn.Module,
    example: Example,
    protect: Sequence[str] = (),
    examples: Sequence[Example] = (),
    lock: Locked = lambda *_: (),
) -> View:
    """Capture a model and describe it.

    Args:
        model: left as it is.
        example: what one forward takes.
        protect: what stays whole.
        examples: further ones.
        lock: locks what only trials show, and says so.

    Raises:
        ForwardError: the forward fails on the example.
    """
    trace = capture(model, example, examples=examples)
    found = structure(model, trace, protect)
    further = lock(model, example, trace, found)
    samples = samples_in(model, example)
    cost = CostModel(model, trace, samples)
    whole = cost.params({})
    # What would go with all units of a group, the others being whole.
    weights = {g.name: whole - cost.params({found.atoms[g.name].id: 0}) for g in found.groups}
    return View(
        type(model).__name__,
        whole,
        cost.macs({}),
        tuple(g for g in found.groups if not g.locks),
        tuple(g for g in found.groups if g.locks),
        weights,
        "example" if samples == 1 < batch_size_of(example) else "sample",
        (*trace.conditions, *further),
        tuple(module_parts(model, found.groups)),
    )
