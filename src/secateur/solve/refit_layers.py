"""The layers that a refit fits: what each reads and returns in both models, sums over batches, and the solution.

Legend: g groups of a convolution, N rows (samples and positions), k columns of the cut weight (one more for the
bias), n outputs that are kept. X is what the cut model feeds the layer, Y what the original's layer returns, so
errors of earlier cuts are corrected too. Everything in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError, UnsupportedError
from secateur.model.tensors import named_tensors
from secateur.registry import suggestion
from secateur.solve.ridge import LEAST, best_ridge, gained, is_held, zeros
from secateur.solve.shortcut import Shortcut, find_shortcut
from secateur.statistics.activations.gram import Geometry, Sampler, geometry
from secateur.statistics.activations.observe import Flow, Observer, Site, argument
from secateur.statistics.activations.streams import finite
from secateur.structure.capture import capture
from secateur.structure.trace import Ref, Trace
from secateur.types import Cuts, Example

CHOOSERS = 32  # outputs at most that choose a ridge where each has weights of its own left
FORMS = 8  # ways in which batches may differ in the calls that the models make
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class RefitRule:
    """What is fitted, and how.

    Args:
        cuts: tensor name -> dimension -> kept indices.
        masks: parameter name -> bool, True = keep.
        what: "weights", or "bias" alone.
        ridge: pull towards the cut weights; None = the one that held-out batches like best.
        positions: places in space per image and convolution; None = all.
        seed: of the places.
    """

    cuts: Cuts
    masks: Mapping[str, Tensor]
    what: str
    ridge: float | None
    positions: int | None
    seed: int

    def within(self, prefix: str, new: str) -> RefitRule:
        """The rule for a part of the model, whose tensors have another prefix there."""

        def renamed(names: Mapping[str, Value]) -> dict[str, Value]:
            return {new + name.removeprefix(prefix): names[name] for name in names if name.startswith(prefix)}

        return replace(self, cuts=renamed(self.cuts), masks=renamed(self.masks))


@dataclass(eq=False)
class RefitSums:
    """X^T X, [g, k, k], and X^T Y, [g, k, n], over some batches."""

    gram: Tensor = field(default_factory=zeros)
    cross: Tensor = field(default_factory=zeros)

    def add(self, rows_gNk: Tensor, goal_Nn: Tensor) -> None:
        """One batch more."""
        goal_gNn = goal_Nn.reshape(len(goal_Nn), rows_gNk.shape[0], -1).transpose(0, 1)
        self.gram = self.gram.to(rows_gNk.device) + rows_gNk.transpose(1, 2) @ rows_gNk
        self.cross = self.cross.to(rows_gNk.device) + rows_gNk.transpose(1, 2) @ goal_gNn


@dataclass(eq=False)
class RefitLayer:
    """One layer to refit: where to look in both runs, and sums over batches that it learns from, and that are held."""

    weight: str
    bias: str
    geometry: Geometry
    outputs: Tensor | None
    original: list[Site]
    cut: list[Site]
    shortcuts: list[Shortcut | None]
    learn: RefitSums = field(default_factory=lambda: RefitSums())
    held: RefitSums = field(default_factory=lambda: RefitSums())


def layers_of(
    cut: nn.Module, traces: tuple[Trace, Trace], rule: RefitRule, wanted: Sequence[str] | None
) -> list[RefitLayer]:
    """The layers to fit in the order in which they run.

    Args:
        cut: the cut model.
        traces: of the original and of the cut model.
        rule: what is cut, and what is fitted.
        wanted: weights to refit; None = those that lost inputs or have a mask.
    """
    cuts, masks = rule.cuts, rule.masks
    flows = Flow(traces[0]), Flow(traces[1])
    uses = [_uses(flow) for flow in flows]
    for name in wanted or ():
        if name not in uses[1]:
            raise RecipeError(f"{name!r} is no weight that multiplies an activation", hint=suggestion(name, uses[1]))
    found = []
    for name, steps in uses[1].items():
        if wanted is not None and name not in wanted:
            continue
        try:
            shape = geometry(flows[1], traces[1].steps[steps[0]])
        except UnsupportedError:
            if wanted is not None:
                raise
            continue
        rows = 1 if shape.turned else 0
        if wanted is None and name not in masks and not any(d == 1 - rows for d in cuts.get(name, {})):
            continue
        if len(uses[0].get(name, ())) != len(steps):
            raise UnsupportedError(f"{name!r} is used {len(steps)} times after the cut and another number before")
        found.append(_layer(cut, flows, name, shape, cuts.get(name, {}).get(rows), (uses[0][name], steps)))
    return _with_bias(found, wanted) if rule.what == "bias" else found


def fit_layers(
    models: tuple[nn.Module, nn.Module],
    traces: tuple[Trace, Trace],
    layers: Sequence[RefitLayer],
    pairs: Callable[[], Iterable[tuple[Example, Example]]],
    rule: RefitRule,
    tell: Callable[[], None],
) -> dict[str, Tensor]:
    """Fit layer by layer, each behind those that are fitted already.

    Args:
        models: the original and the cut model, which is changed in place.
        traces: of both.
        layers: in the order in which they run.
        pairs: gives all batches anew, for the original and for the cut model.
        rule: how.
        tell: called after every batch.

    Returns:
        name of every changed weight and bias -> its new value.
    """
    changed: dict[str, Tensor] = {}
    forms = _Forms(models, rule, traces, layers)
    for layer in layers:
        sampler = Sampler(rule.positions, rule.seed)
        choosing = rule.ridge if rule.what == "weights" else LEAST  # a bias is not pulled
        for place, examples in enumerate(pairs(), start=1):
            sums = layer.held if is_held(place, choosing) else layer.learn
            forms.add(place, layer.weight, sums, sampler, examples)
            tell()
        for sums in (layer.learn, layer.held):
            finite(sums.gram.diagonal(dim1=-2, dim2=-1).flatten() if sums.gram.dim() else sums.gram[None])
            finite(sums.cross.flatten())
        mask = rule.masks.get(layer.weight)
        fitted = _shift(models[1], layer) if rule.what == "bias" else _solve(models[1], layer, rule.ridge, mask)
        changed.update(fitted)
    return changed


class _Forms:
    """The calls that the models make for a batch, where batches differ in them: a mask that padding alone needs.

    A batch that fits no trace so far is traced itself, once; which one it fits is kept for the next layer.
    """

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module],
        rule: RefitRule,
        traces: tuple[Trace, Trace],
        layers: Sequence[RefitLayer],
    ) -> None:
        self._models, self._rule, self._names = models, rule, [layer.weight for layer in layers]
        self._known = [(traces, {layer.weight: layer for layer in layers})]
        self._fits: dict[int, int] = {}

    def add(
        self, place: int, weight: str, sums: RefitSums, sampler: Sampler, examples: tuple[Example, Example]
    ) -> None:
        """Add a batch to the sums of a layer.

        Raises:
            UnsupportedError: the models do other things even than on this very batch before, or in too many ways.
        """
        # First the one that it fitted for the layer before, of which less of the run is seen than of this one.
        last, failed = self._fits.get(place, 0), UnsupportedError("no trace fits the batch")
        for form in sorted(range(len(self._known)), key=lambda number: number != last):
            traces, layers = self._known[form]
            try:
                _add_batch(self._models, traces, layers[weight], sums, sampler, examples)
            except UnsupportedError as error:
                failed = error
                continue
            self._fits[place] = form
            return
        if len(self._known) == FORMS:
            raise failed
        traces = capture(self._models[0], examples[0]), capture(self._models[1], examples[1])
        found = layers_of(self._models[1], traces, self._rule, self._names)
        self._known.append((traces, {layer.weight: layer for layer in found}))
        self._fits[place] = len(self._known) - 1
        _add_batch(self._models, traces, self._known[-1][1][weight], sums, sampler, examples)


def _uses(flow: Flow) -> dict[str, list[int]]:
    uses: dict[str, list[int]] = {}
    for i, step in enumerate(flow.trace.steps):
        name = flow.weight(step) if step.contracted else ""
        if name:
            uses.setdefault(name, []).append(i)
    return uses


def _layer(
    cut: nn.Module,
    flows: tuple[Flow, Flow],
    name: str,
    shape: Geometry,
    outputs: Tensor | None,
    steps: tuple[list[int], list[int]],
) -> RefitLayer:
    before, after = flows[0].trace.steps, flows[1].trace.steps
    addend = argument(after[steps[1][0]], "self" if not shape.kernel else "bias")
    addend = argument(after[steps[1][0]], "bias", addend)
    bias = flows[1].source(addend.number)[0] if isinstance(addend, Ref) else ""
    shortcuts = [find_shortcut(flows, (a, b), outputs, named_tensors(cut)) for a, b in zip(*steps, strict=True)]
    return RefitLayer(
        name,
        bias if bias in dict(cut.named_parameters()) else "",
        shape,
        outputs,
        [Site(i, before[i].outputs[0], 0, result=True, weight=name) for i in steps[0]],
        [Site(i, n, 0, weight=name) for i in steps[1] for n, *_ in after[i].contracted if n in flows[1].activations],
        shortcuts,
    )


def _add_batch(
    models: tuple[nn.Module, nn.Module],
    traces: tuple[Trace, Trace],
    layer: RefitLayer,
    sums: RefitSums,
    sampler: Sampler,
    examples: tuple[Example, Example],
) -> None:
    """Add one batch to the sums of a layer: first the cut model, where the rows are drawn, then the original."""
    shape = layer.geometry
    rows: dict[int, Tensor] = {}
    where: dict[int, Tensor | None] = {}
    aside = {s.cut: i for i, s in enumerate(layer.shortcuts) if s is not None}
    moved: dict[int, Tensor] = {}

    def see_cut(site: Site, value: Tensor) -> None:
        if site in aside:
            moved[aside[site]] = -shape.targets(value, where[aside[site]])
            return
        i = layer.cut.index(site)
        where[i] = shape.places(value, sampler)
        rows[i] = shape.rows(value, where[i])

    Observer(models[1], traces[1], [*layer.cut, *aside], last=True).run(examples[1], see_cut)
    goals: dict[int, Tensor] = {}
    before = {s.original: i for i, s in enumerate(layer.shortcuts) if s is not None}

    def see_original(site: Site, value: Tensor) -> None:
        i = before[site] if site in before else layer.original.index(site)
        taken = shape.targets(value, where[i])
        taken = taken if layer.outputs is None else taken[:, layer.outputs.to(taken.device)]
        if site in before:
            moved[i] = moved[i] + taken
        else:
            goals[i] = taken

    Observer(models[0], traces[0], [*layer.original, *before], last=True).run(examples[0], see_original)
    for i, shortcut in enumerate(layer.shortcuts):
        goal = goals[i] if shortcut is None else goals[i] + moved[i] * shortcut.factor.to(goals[i].device)
        one = torch.ones_like(rows[i][..., :1])
        sums.add(torch.cat([rows[i], one], -1) if layer.bias else rows[i], goal)


def _with_bias(layers: list[RefitLayer], wanted: Sequence[str] | None) -> list[RefitLayer]:
    """The layers that have a bias; only these can be shifted."""
    found = [layer for layer in layers if layer.bias]
    without = [layer.weight for layer in layers if not layer.bias]
    if without and (wanted is not None or not found):
        raise RecipeError(f"{without[0]!r} has no bias to fit", hint="use what: weights")
    return found


def _shift(cut: nn.Module, layer: RefitLayer) -> dict[str, Tensor]:
    """Give each output of a layer the mean that it had, by its bias."""
    now_gnk = layer.geometry.matrix(cut.get_parameter(layer.weight))
    bias = cut.get_parameter(layer.bias)
    now_gnk = torch.cat([now_gnk, bias.detach().double().reshape(now_gnk.shape[0], -1, 1)], -1)
    sums = layer.learn
    missing = (sums.cross - sums.gram @ now_gnk.transpose(1, 2))[:, -1] / sums.gram[:, -1:, -1]
    value = (bias.detach().double() + missing.reshape(bias.shape)).to(bias)
    with torch.no_grad():
        bias.copy_(value)
    return {layer.bias: value}


def _each_row(gram: Tensor, missing: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """The change of every output over the columns that it keeps, [g, n, k]; 0 elsewhere. Columns beyond are biases."""
    change = torch.zeros(missing.transpose(1, 2).shape, dtype=missing.dtype, device=missing.device)
    bias = torch.arange(keep.shape[2], gram.shape[-1], device=keep.device)
    for group in range(keep.shape[0]):
        for row in range(keep.shape[1]):
            kept = torch.nonzero(keep[group, row]).flatten()
            at = torch.cat([kept, bias])
            if len(kept):
                part = gram[group][at][:, at]
                found = least_squares(part, missing[group][at, row : row + 1], ridge=ridge, columns=len(kept))
                change[group, row, at] = found[:, 0]
    return change


def _solve(cut: nn.Module, layer: RefitLayer, ridge: float | None, mask: Tensor | None) -> dict[str, Tensor]:
    """Solve for the change of a layer and write it into the model; nothing where no change is for the better."""
    weight = cut.get_parameter(layer.weight)
    now_gnk = layer.geometry.matrix(weight)
    columns = now_gnk.shape[2]
    if layer.bias:
        offset = cut.get_parameter(layer.bias).detach().double().reshape(now_gnk.shape[0], -1, 1)
        now_gnk = torch.cat([now_gnk, offset], -1)
    keep = None if mask is None else layer.geometry.matrix(mask.expand(weight.shape).to(weight)) > 0

    def missing(sums: RefitSums) -> Tensor:
        return sums.cross - sums.gram @ now_gnk.transpose(1, 2)

    def change(sums: RefitSums, ridge: float, rows: slice) -> Tensor:
        wanted = missing(sums)[..., rows]
        if keep is None:
            return least_squares(sums.gram, wanted, ridge=ridge, columns=columns)
        return _each_row(sums.gram, wanted, keep[:, rows], ridge).transpose(1, 2)

    every = slice(None)
    if ridge is None and layer.held.gram.dim():
        # Under a mask each output is a system of its own: some of them choose for all.
        some = every if keep is None else slice(None, None, max(keep.shape[1] // CHOOSERS, 1))
        ridge = best_ridge(
            lambda r: gained(change(layer.learn, r, some), layer.held.gram, missing(layer.held)[..., some])
        )
        if ridge is None:
            return {}
        layer.learn = RefitSums(layer.learn.gram + layer.held.gram, layer.learn.cross + layer.held.cross)
    new_gnk = now_gnk + change(layer.learn, LEAST if ridge is None else ridge, every).transpose(1, 2)
    changed = {layer.weight: layer.geometry.weight(new_gnk[..., :columns], weight)}
    if layer.bias:
        bias = cut.get_parameter(layer.bias)
        changed[layer.bias] = new_gnk[..., columns].reshape(bias.shape).to(bias)
    with torch.no_grad():
        for name, value in changed.items():
            cut.get_parameter(name).copy_(value)
    return changed


def least_squares(gram: Tensor, cross: Tensor, *, ridge: float = 0.0, columns: int | None = None) -> Tensor:
    """argmin_B ||Y - X B||^2 + lam ||B||^2 from second moments, lam = ridge times the mean diagonal.

    Args:
        gram: X^T X, float64 [..., k, k].
        cross: X^T Y, float64 [..., k, n].
        ridge: relative; 0 gives the solution of least norm.
        columns: the first columns are damped, the others (a bias) hardly; default all.

    Returns:
        B, float64 [..., k, n].

    Example:
        >>> least_squares(torch.eye(2).double() * 4, torch.tensor([[8.0], [4.0]]).double()).flatten().tolist()
        [2.0, 1.0]
    """
    size = gram.shape[-1]
    columns = size if columns is None else columns
    level = gram.diagonal(dim1=-2, dim2=-1)[..., :columns].mean(-1, keepdim=True)
    damping = torch.full((size,), 1e-12, dtype=gram.dtype, device=gram.device)
    damping[:columns] = ridge
    if ridge > 0:
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed((level * damping).clamp(min=1e-300)))
        if not bool(info.any()):
            return torch.cholesky_solve(cross, factor)
    # Least norm: the null directions of the inputs keep what they have.
    values, vectors = torch.linalg.eigh(gram + torch.diag_embed(level * damping * (ridge > 0)))
    usable = values > values[..., -1:] * size * 1e-14
    inverse = torch.where(usable, 1 / torch.where(usable, values, 1.0), 0.0)
    solution: Tensor = vectors @ (inverse[..., None] * (vectors.transpose(-1, -2) @ cross))
    return solution
