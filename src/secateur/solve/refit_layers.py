"""The layers that a refit fits: what each reads and returns in both models, and which have no closed form.

Legend: g groups of a convolution, N rows (samples and positions), k columns of the cut weight (one more for the
bias), n outputs that are kept. X is what the cut model feeds the layer, Y what it returns less than the original's
layer, so errors of earlier cuts are corrected too. Everything in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeVar

from torch import Tensor, nn

from secateur.errors import RecipeError, UnsupportedError
from secateur.model.tensors import named_tensors
from secateur.registry import suggestion
from secateur.solve.ridge import zeros
from secateur.solve.shortcut import Shortcut, find_shortcut
from secateur.statistics.activations.gram import Geometry, geometry
from secateur.statistics.activations.observe import Flow, Site, argument
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Ref, Step, Trace
from secateur.types import Cuts

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class RefitRule:
    """What is fitted, and how.

    Args:
        cuts: tensor name -> dimension -> kept indices.
        masks: parameter name -> bool, True = keep.
        zeros: the same of earlier rounds, which are no reason for a fit.
        what: "weights", or "bias" alone.
        ridge: pull towards the cut weights; None = the one that held-out batches like best.
        positions: places in space per image and convolution; None = all.
        seed: of the places.
    """

    cuts: Cuts
    masks: Mapping[str, Tensor]
    zeros: Mapping[str, Tensor]
    what: str
    ridge: float | None
    positions: int | None
    seed: int

    def within(self, prefix: str, new: str) -> RefitRule:
        """The rule for a part of the model, whose tensors have another prefix there."""

        def renamed(names: Mapping[str, Value]) -> dict[str, Value]:
            return {new + name.removeprefix(prefix): names[name] for name in names if name.startswith(prefix)}

        return replace(self, cuts=renamed(self.cuts), masks=renamed(self.masks), zeros=renamed(self.zeros))

    def keep(self, weight: str) -> Tensor | None:
        """Which entries of a weight may be fitted; None = all."""
        both = [masks[weight] for masks in (self.masks, self.zeros) if weight in masks]
        return both[0] & both[-1] if both else None


@dataclass(eq=False)
class RefitSums:
    """X^T X, [g, k, k], X^T Y, [g, k, n], and the sum of squares of Y, over some batches."""

    gram: Tensor = field(default_factory=zeros)
    cross: Tensor = field(default_factory=zeros)
    missing: float = 0.0

    def add(self, rows_gNk: Tensor, goal_Nn: Tensor) -> None:
        """One batch more."""
        goal_gNn = goal_Nn.reshape(len(goal_Nn), rows_gNk.shape[0], -1).transpose(0, 1)
        self.gram = self.gram.to(rows_gNk.device) + rows_gNk.transpose(1, 2) @ rows_gNk
        self.cross = self.cross.to(rows_gNk.device) + rows_gNk.transpose(1, 2) @ goal_gNn
        self.missing += float(goal_Nn.square().sum())


@dataclass(eq=False)
class RefitLayer:
    """One layer to refit: where to look in both runs, and sums over batches that it learns from, and that are held.

    Args:
        weight, bias: names; the bias is "" where there is none that serves this weight alone.
        geometry: how the weight multiplies.
        outputs: kept outputs; None = all.
        original: what it returns in the original, for every use.
        inputs, results: what it reads and returns in the cut model, for every use.
        shortcuts: what each result is added to.
        shared: the weight is used several times, or its bias serves others too.
        learn, held: sums.
        left: why no fit of it was kept, "" where that is no matter of its kind.
    """

    weight: str
    bias: str
    geometry: Geometry
    outputs: Tensor | None
    original: list[Site]
    inputs: list[Site]
    results: list[Site]
    shortcuts: list[Shortcut | None]
    shared: bool
    learn: RefitSums = field(default_factory=RefitSums)
    held: RefitSums = field(default_factory=RefitSums)
    left: str = ""


def layers_of(
    cut: nn.Module, traces: tuple[Trace, Trace], rule: RefitRule, wanted: Sequence[str] | None
) -> tuple[list[RefitLayer], dict[str, str]]:
    """The layers to fit in the order in which they run, and weights that should be fitted and have no closed form.

    Args:
        cut: the cut model.
        traces: of the original and of the cut model.
        rule: what is cut, and what is fitted.
        wanted: weights to refit; None = those that lost inputs or have a mask.

    Returns:
        The layers, and for each of the other weights why it is left as it is.
    """
    flows = Flow(traces[0]), Flow(traces[1])
    uses = [uses_of(flow) for flow in flows]
    for name in wanted or ():
        if name not in uses[1]:
            raise RecipeError(f"{name!r} is no weight that multiplies an activation", hint=suggestion(name, uses[1]))
    found, left, readers = list[RefitLayer](), dict[str, str](), _readers(flows[1])
    for name, steps in uses[1].items():
        before = uses[0].get(name, [])
        lost = bool(before) and _inputs(flows[0], before[0]) != _inputs(flows[1], steps[0])
        if name not in wanted if wanted is not None else not (lost or name in rule.masks):
            continue
        try:
            shape = _closed_form(flows[1], name, steps, readers[name])
        except UnsupportedError as error:
            if wanted is not None:
                raise
            left[name] = error.why or str(error)
            continue
        if len(before) != len(steps):
            raise UnsupportedError(f"{name!r} is used {len(steps)} times after the cut and {len(before)} times before")
        outputs = rule.cuts.get(name, {}).get(1 if shape.turned else 0)
        found.append(_layer(cut, flows, name, shape, outputs, (before, steps), readers))
    if wanted is None:
        matrices = [name for name, parameter in cut.named_parameters() if parameter.dim() > 1]
        asked = [name for name in matrices if name in rule.cuts or name in rule.masks]
        left.update({name: "the first batch does not reach it" for name in asked if name not in readers})
    return (_with_bias(found, wanted) if rule.what == "bias" else found), left


def uses_of(flow: Flow) -> dict[str, list[int]]:
    """Name of every weight that is multiplied with an activation -> the steps that do so."""
    uses: dict[str, list[int]] = {}
    for i, step in enumerate(flow.trace.steps):
        name = flow.weight(step) if step.contracted else ""
        if name:
            uses.setdefault(name, []).append(i)
    return uses


def _readers(flow: Flow) -> dict[str, list[int]]:
    """Name of every parameter and buffer -> the steps that compute with it."""
    readers: dict[str, list[int]] = {}
    for i, step in enumerate(flow.trace.steps):
        if not flow.moves(step):
            for name in dict.fromkeys(flow.source(n)[0] for n in flow.read(step)):
                readers.setdefault(name, []).append(i)
    return readers


def _inputs(flow: Flow, step: int) -> int:
    """How many inputs a weight sums over."""
    contracted = flow.trace.steps[step].contracted
    return prod(axis.size for number, _, axis in contracted if number not in flow.activations)


def _closed_form(flow: Flow, name: str, uses: Sequence[int], readers: Sequence[int]) -> Geometry:
    """How a weight multiplies, where least squares are what fits it.

    Raises:
        UnsupportedError: no product of a linear layer or convolution, or something else reads the weight too.
    """
    steps = [flow.trace.steps[i] for i in uses]
    shape = geometry(flow, steps[0])
    if others := [base_name(flow.trace.steps[i].func) for i in readers if i not in uses]:
        raise _refused(name, f"the model also calls {others[0]} with it (a tied embedding, for example)")
    if any(geometry(flow, step) != shape for step in steps):
        raise _refused(name, "the model multiplies with it in different ways")
    if any(argument(step, "alpha", 1) != 1 for step in steps):
        raise _refused(name, "the model multiplies its product by a number in the same call (alpha)")
    return shape


def _refused(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"{name!r} cannot be refitted", why=why, hint="leave it out, or use finetune")


def _bias(cut: nn.Module, flow: Flow, steps: Sequence[Step], outputs: int) -> str:
    """The parameter that a layer adds as it is to its product; "" where there is none, whatever else it adds."""
    names = set()
    for step in steps:
        addend = argument(step, "bias", argument(step, "self"))
        plain = isinstance(addend, Ref) and argument(step, "beta", 1) == 1
        names.add(flow.source(addend.number)[0] if plain else "")
    name = names.pop() if len(names) == 1 else ""
    found = dict(cut.named_parameters()).get(name)
    return name if found is not None and found.numel() == outputs else ""


def _layer(
    cut: nn.Module,
    flows: tuple[Flow, Flow],
    name: str,
    shape: Geometry,
    outputs: Tensor | None,
    steps: tuple[list[int], list[int]],
    readers: Mapping[str, Sequence[int]],
) -> RefitLayer:
    before, after = flows[0].trace.steps, flows[1].trace.steps
    weight = cut.get_parameter(name)
    bias = _bias(cut, flows[1], [after[i] for i in steps[1]], weight.shape[1 if shape.turned else 0])
    # A bias that others add too would move what they give.
    alone = not bias or list(readers[bias]) == steps[1]
    shortcuts: list[Shortcut | None] = [None] * len(steps[1])
    if len(steps[1]) == 1:
        # Of several uses one may stand in the shortcut of another, which a fit would then make good twice.
        shortcuts = [find_shortcut(flows, (steps[0][0], steps[1][0]), outputs, named_tensors(cut))]
    return RefitLayer(
        name,
        bias if alone else "",
        shape,
        outputs,
        [Site(i, before[i].outputs[0], 0, result=True, weight=name) for i in steps[0]],
        [Site(i, n, 0, weight=name) for i in steps[1] for n, *_ in after[i].contracted if n in flows[1].activations],
        [Site(i, after[i].outputs[0], 0, result=True, weight=name) for i in steps[1]],
        shortcuts,
        shared=not alone or len(steps[1]) > 1,
    )


def _with_bias(layers: list[RefitLayer], wanted: Sequence[str] | None) -> list[RefitLayer]:
    """The layers that have a bias; only these can be shifted."""
    found = [layer for layer in layers if layer.bias]
    without = [layer.weight for layer in layers if not layer.bias]
    if without and (wanted is not None or not found):
        raise RecipeError(f"{without[0]!r} has no bias to fit", hint="use what: weights")
    return found
