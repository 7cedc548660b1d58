"""Derivatives with respect to gates on units, sample by sample: z_u multiplies the weights of unit u.

At z = 1 it is dl_n/dz_u = sum of g_{n,i} w_i over the weights of the unit, for the gradient g_n of the loss of
sample n. Most of it is read off the layers (`taps`), which costs less than one ordinary backward pass; where
that does not apply, per-sample gradients are formed. Reading off believes that the first dimension is the
sample and that the loss is a mean: it is compared with the exact gradients of two samples before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from secateur.criteria.base import Context
from secateur.criteria.gradients.loss_gradient import (
    accumulable,
    backward,
    loss_of,
    refuse_unused,
    require_finite_gradient,
    unit_values,
    walk,
)
from secateur.criteria.gradients.taps import Listener, Tap, find_taps
from secateur.criteria.sums import counts
from secateur.model.share import everywhere, over_processes
from secateur.statistics.gradients.functional import samples_of
from secateur.statistics.gradients.per_sample import Way, iterate_per_sample_gradients
from secateur.types import Batch, Group


def mean_over_samples(
    context: Context,
    roles: frozenset[str] | None,
    names: Sequence[str],
    power: Callable[[Tensor], Tensor],
    *,
    unused: str = "error",
) -> dict[str, Tensor]:
    """mean_n f(sum of g_{n,i} w_i over the unit), for f = square or absolute value.

    Args:
        context: model, groups, data and loss.
        roles: roles of the spans that count.
        names: the parameters that count; they are left with requires_grad False.
        power: f, applied to every sample and unit.
        unused: "error" refuses parameters that no loss reaches, "zero" lets them count nothing.

    Returns:
        Group name -> tensor [units].

    Raises:
        InputError: a parameter that no loss reaches.
        NonFiniteError: a loss or a derivative is NaN or Inf.
    """
    single = [g for g in context.groups if g.spans and g.spans[0].index is None]
    grouped = [g for g in context.groups if g not in single]
    total: dict[str, Tensor] = {}
    for groups, values in ((single, _single_weights), (grouped, per_sample_units)):
        if not groups:
            continue
        part = replace(context, groups=groups)
        own = [n for n in names if any(s.tensor == n for g in groups for s in g.spans)]
        found: dict[str, Tensor] = {}
        samples = 0
        for rows in values(part, roles, own, unused=unused):
            samples += len(next(iter(rows.values())))
            for name, value in rows.items():
                more = power(value).sum(0)
                found[name] = found[name] + more if name in found else more
        found, samples = over_processes(context.data, found, samples)
        total |= {name: value / samples for name, value in found.items()}
    return total


def _single_weights(
    context: Context, roles: frozenset[str] | None, names: Sequence[str], *, unused: str
) -> Iterator[dict[str, Tensor]]:
    """The products g_{n,i} w_i, some samples at a time: group name -> [samples, weights]."""
    weights = {name: accumulable(context.model.get_parameter(name)) for name in names}
    unreached = list(names) if unused == "error" else []
    for number, (batch, size) in enumerate(walk(context)):
        if unreached:
            unreached = _still_unreached(context, unreached, batch, size, number)
        for gradients in iterate_per_sample_gradients(context.model, loss_of(context), batch, names):
            products = {name: accumulable(gradients[name]) * weight for name, weight in weights.items()}
            for name, value in products.items():
                require_finite_gradient(value, name)
            yield {g.name: unit_values(products, g, roles, batch=True) for g in context.groups}
    refuse_unused(everywhere(context.data, unreached))


def per_sample_units(
    context: Context, roles: frozenset[str] | None, names: Sequence[str], *, unused: str = "error"
) -> Iterator[dict[str, Tensor]]:
    """The sums of g_{n,i} w_i of every unit and sample, batch by batch.

    Args:
        context: model, groups (of any granularity but element), data and loss.
        roles: roles of the spans that count.
        names: the parameters that count; they are left with requires_grad False.
        unused: "error" refuses parameters that no loss reaches, "zero" lets them count nothing.

    Returns:
        For every batch: group name -> float64 tensor [samples, units].

    Raises:
        InputError: a parameter that no loss reaches.
        NonFiniteError: a loss or a derivative is NaN or Inf.

    Cost:
        One forward pass and a backward pass without weight gradients, where every layer can be tapped; 2 to 4
        forward-backward passes else.
    """
    context = replace(context, groups=[_counted(group, roles, names) for group in context.groups])
    weights = {name: accumulable(context.model.get_parameter(name)) for name in names}
    taps, rest = find_taps(context.model, context.groups)
    unreached = list(names) if unused == "error" else []
    for parameter in context.model.parameters():
        parameter.requires_grad_(False)  # sums need no weight gradients: a third of the work is saved
    for number, (batch, size) in enumerate(walk(context)):
        if unreached:
            unreached = _still_unreached(context, unreached, batch, size, number)
        found = _tapped(context, taps, batch, size, number)
        if number == 0 and found:
            tapped = {tap.tensor: weights[tap.tensor] for tap in taps}
            found = found if _agrees(context, found, batch, size, tapped) else None
        if found is None:
            taps, rest, found = [], list(names), {}
        formed = _formed(context, {name: weights[name] for name in rest}, batch)
        total = {g.name: _sum(g, size, found, formed) for g in context.groups}
        for name, value in total.items():
            require_finite_gradient(value, name)
        yield total
    refuse_unused(everywhere(context.data, unreached))


def _counted(group: Group, roles: frozenset[str] | None, names: Sequence[str]) -> Group:
    spans = tuple(s for s in group.spans if s.tensor in names and counts(s.role, roles))
    return replace(group, spans=spans)


def _sum(group: Group, size: int, *parts: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(size, group.size, dtype=torch.float64)
    for part in parts:
        if group.name in part:
            total += part[group.name]
    return total


def _tapped(context: Context, taps: Sequence[Tap], batch: Batch, size: int, number: int) -> dict[str, Tensor] | None:
    """Unit sums of every sample read off the taps; None where a layer does not run sample by sample."""
    if not taps:
        return {}
    listener = Listener(taps, size)
    with listener.listening():
        backward(context, batch, number)
    if not listener.fits:
        return None
    # A mean over the batch divided every sample's share by the number of samples.
    return {name: size * value for name, value in listener.units(context.groups).items()}


def _formed(context: Context, weights: Mapping[str, Tensor], batch: Batch, way: Way = "auto") -> dict[str, Tensor]:
    """Unit sums of every sample from formed per-sample gradients: always right, and slower."""
    if not weights:
        return {}
    groups = [g for g in context.groups if any(span.tensor in weights for span in g.spans)]
    loss, parts = loss_of(context), []
    for gradients in iterate_per_sample_gradients(context.model, loss, batch, list(weights), way=way):
        products = {name: accumulable(gradients[name]) * weight for name, weight in weights.items()}
        parts.append({group.name: unit_values(products, group, None, batch=True) for group in groups})
    return {group.name: torch.cat([part[group.name] for part in parts]) for group in groups}


def _agrees(
    context: Context, found: Mapping[str, Tensor], batch: Batch, size: int, weights: Mapping[str, Tensor]
) -> bool:
    """Whether the tapped sums of the first and the last sample are those of their own loss."""
    which = sorted({0, size - 1})
    exact = _formed(context, weights, samples_of(batch, size, which), way="loop")
    largest = max(float(value.abs().max()) for value in exact.values())
    slack = 0.1 if any(p.element_size() < 4 for p in context.model.parameters()) else 1e-2
    for name, value in exact.items():
        error = float((found[name][which] - value).abs().max())
        if not error <= slack * float(value.abs().max()) + 1e-3 * slack * largest:
            return False
    return True


def _still_unreached(context: Context, names: Sequence[str], batch: Batch, size: int, number: int) -> list[str]:
    """Those parameters to which the loss of the batch sends no gradient: one sample is tried first."""
    left = list(names)
    for part in (samples_of(batch, size, [0]), batch):
        waiting = {name: context.model.get_parameter(name) for name in left}
        for parameter in waiting.values():
            parameter.requires_grad_(True)
        backward(context, part, number)
        left = [name for name, parameter in waiting.items() if parameter.grad is None]
        for parameter in waiting.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        if not left:
            break
    return left
