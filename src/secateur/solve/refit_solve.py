"""The solution of a refit, layer by layer; see `refit_layers` for the letters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from secateur.solve.refit_layers import RefitLayer, RefitRule, RefitSums
from secateur.solve.refit_seen import BatchForms, RefitBatch
from secateur.solve.ridge import LEAST, RidgeSolver, is_held
from secateur.statistics.activations.gram import Sampler
from secateur.statistics.activations.streams import finite
from secateur.structure.trace import Trace

RefitBatches = Callable[[], Iterable[RefitBatch]]


def fit_layers(
    models: tuple[nn.Module, nn.Module],
    traces: tuple[Trace, Trace],
    layers: Sequence[RefitLayer],
    batches: RefitBatches,
    rule: RefitRule,
    tell: Callable[[], None],
) -> dict[str, Tensor]:
    """Fit layer by layer, each behind those that are fitted already.

    A weight that is used several times may change its own inputs; its fit is kept if it is better with those.

    Args:
        models: the original and the cut model, which is changed in place.
        traces: of both.
        layers: in the order in which they run.
        batches: gives all batches anew.
        rule: how.
        tell: called after every batch.

    Returns:
        name of every changed weight and bias -> its new value.
    """
    changed: dict[str, Tensor] = {}
    forms = BatchForms(models, rule, traces, layers)
    choosing = rule.ridge if rule.what == "weights" else LEAST  # a bias is not pulled

    def read(layer: RefitLayer, tell: Callable[[], None] = lambda: None) -> tuple[RefitSums, RefitSums]:
        learn, held, sampler = RefitSums(), RefitSums(), Sampler(rule.positions, rule.seed)
        for place, batch in enumerate(batches(), start=1):
            forms.add(place, layer.weight, held if is_held(place, choosing) else learn, sampler, batch)
            tell()
        return learn, held

    for layer in layers:
        layer.learn, layer.held = read(layer, tell)
        for sums in (layer.learn, layer.held):
            finite(sums.gram.diagonal(dim1=-2, dim2=-1).flatten() if sums.gram.dim() else sums.gram[None])
            finite(sums.cross.flatten())
        was = {name: models[1].get_parameter(name).detach().clone() for name in (layer.weight, layer.bias) if name}
        judged = layer.held.missing if layer.held.gram.dim() else layer.learn.missing
        fitted = _fitted(models[1], layer, rule)
        if fitted and len(layer.inputs) > 1:
            learn, held = read(layer)
            if not (held.missing if held.gram.dim() else learn.missing) < judged:
                layer.left = (
                    "it is used several times, and a fit of all uses at once changes its own inputs for the worse"
                )
                _write(models[1], was)
                fitted = {}
        changed.update(fitted)
    return changed


def _fitted(cut: nn.Module, layer: RefitLayer, rule: RefitRule) -> dict[str, Tensor]:
    """Fit a layer to its sums; nothing where no batch reached it."""
    if not layer.learn.gram.dim():
        layer.left = "no batch reaches it"
        return {}
    if rule.what == "bias":
        return _shift(cut, layer)
    return _solve(cut, layer, rule.ridge, rule.keep(layer.weight))


def _write(cut: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for name, value in values.items():
            cut.get_parameter(name).copy_(value)
    return values


def _shift(cut: nn.Module, layer: RefitLayer) -> dict[str, Tensor]:
    """Give each output of a layer the mean that it had, by its bias."""
    bias = cut.get_parameter(layer.bias)
    missing = layer.learn.cross[:, -1] / layer.learn.gram[:, -1:, -1]
    return _write(cut, {layer.bias: (bias.detach().double() + missing.reshape(bias.shape)).to(bias)})


def _solve(cut: nn.Module, layer: RefitLayer, ridge: float | None, mask: Tensor | None) -> dict[str, Tensor]:
    """Solve for the change of a layer and write it into the model; nothing where no change is for the better."""
    weight = cut.get_parameter(layer.weight)
    now_gnk = layer.geometry.matrix(weight)
    columns = now_gnk.shape[2]
    keep = None if mask is None else layer.geometry.matrix(mask.expand(weight.shape).to(weight)) > 0
    solver, learn, held = RidgeSolver(columns, keep), layer.learn, layer.held
    if ridge is None and held.gram.dim():
        ridge = solver.best((learn.gram, learn.cross), (held.gram, held.cross))
        if ridge is None:
            return {}
        learn = RefitSums(learn.gram + held.gram, learn.cross + held.cross)
    found_gnk = solver.solve(learn.gram, learn.cross, LEAST if ridge is None else ridge).transpose(1, 2)
    changed = {layer.weight: layer.geometry.weight(now_gnk + found_gnk[..., :columns], weight)}
    if layer.bias:
        bias = cut.get_parameter(layer.bias)
        changed[layer.bias] = (bias.detach().double() + found_gnk[..., columns].reshape(bias.shape)).to(bias)
    return _write(cut, changed)
