"""Integrated gradients: what the loss changes on the way from a weight to zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from secateur.criteria.base import Context, register
from secateur.criteria.forecast import EpochForecast
from secateur.criteria.gradients.loss_gradient import (
    CoupledCriterion,
    accumulable,
    loss_of,
    require_finite_gradient,
    unit_values,
    walk,
)
from secateur.errors import RecipeError
from secateur.model.kernels import exact_derivatives
from secateur.registry import one_of
from secateur.statistics.gradients.functional import loss_value, require_finite_loss
from secateur.types import Group

Steps = list[tuple[float, float]]


@register
@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(CoupledCriterion):
    """Score a unit by the slope of the loss summed up while weights shrink in a straight line to zero.

    The idea: -g w at the start of the way is only the first term of a series; the integral over the way has
    all of them. With path "unit" the score *is* the change of the loss when this unit alone is removed (as
    exact as the quadrature, and exact for losses that are polynomials along the way): the oracle that
    cheaper criteria are measured against. A bad choice for large models with path "unit" (one walk through
    the data per unit and step), and with "joint" on deep networks, where the way leads through networks in
    which everything is half removed.

    Formula: s_u = -sum over the weights of u of w_i * integral_0^1 g_i(w(t)) dt. In w(t) the weights of this unit
    ("unit"), of its group ("group") or of all groups ("joint") are multiplied by t. The scores of what shrinks
    together add up to the change of the loss when all of it is removed.

    Args:
        steps: nodes of the Gauss-Legendre quadrature, at least 1; n nodes are exact where the slope along
            the way is a polynomial of degree 2 n - 1.
        path: what shrinks together: "unit", "group" or "joint".
        negative: what becomes of a negative score, which says that the loss will fall: "keep" ranks it first
            for removal, "clip" makes it 0, "abs" distrusts changes of either sign.
        coupled: "all" weights that go with the unit, "out" the producing ones, "in" the consuming ones.
        normalize: "none" compares changes of the loss; "mean" and "l2" divide by the group's mean |score| and
            L2 norm.
        frozen: "error" refuses parameters with requires_grad=False, "score" scores them all the same.
        unused: "error" refuses parameters that the loss never reaches, "zero" gives them the gradient 0.

    Raises:
        RecipeError: fewer than one step, an unknown word, or no data.
        InputError: frozen or unused parameters; the message names them.
        NonFiniteError: the loss or a gradient is NaN or Inf.

    Cost:
        steps forward and backward passes over the data for "joint", times the number of groups for "group",
        times the number of units for "unit".

    Source:
        Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", 2017, equation 1, applied to weights
        with baseline 0; completeness (the sum is the change of the loss) is proposition 1 there.

    Example:
        L = 2 w0^2 + w1^2 / 2 at (0.5, 3): without w0 it falls by 0.5, without w1 by 4.5.

        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, 3.0]]))
        >>> group = Group("weight", "element", (1, 2), (Span("weight", None, "self"),))
        >>> def loss(model, batch):
        ...     return (model.weight.square() * batch).sum() / 2
        >>> context = Context(layer, [group], data=[torch.tensor([[4.0, 1.0]])], loss=loss)
        >>> IntegratedGradients(steps=1, path="unit").score(context)["weight"]
        tensor([[-0.5000, -4.5000]])
    """

    name: ClassVar[str] = "integrated"
    summary: ClassVar[str] = "change of the loss along the straight way to zero: the integral of -g w"
    speed: ClassVar[str] = "slow: eight epochs per group over the scoring data"
    best_for: ClassVar[str] = "small models; the true change per unit as an oracle (path 'unit')"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split"})

    steps: int = 8
    path: Literal["unit", "group", "joint"] = "group"
    negative: Literal["keep", "clip", "abs"] = "keep"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        one_of("path", self.path, ("unit", "group", "joint"))
        one_of("negative", self.negative, ("keep", "clip", "abs"))
        if self.steps < 1:
            raise RecipeError(f"steps={self.steps} of the integral", hint="use at least 1")

    def forecast(self, context: Context) -> EpochForecast | None:
        """Epochs by the number of ways to zero."""
        units = sum(group.size for group in context.groups)
        ways = {"unit": units, "group": len(context.groups), "joint": 1}[self.path]
        why = f"{self.steps} steps on each of {ways} ways"
        return EpochForecast(float(self.steps * ways), why, 'take fewer steps, path="joint", or criterion taylor')

    def _score(self, context: Context) -> dict[str, Tensor]:
        self.mean_gradient(context)  # refuses frozen and unused parameters, and gradients that are not finite
        weights = self.weights(context)
        scores = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in context.groups}
        for shrinking, group, unit in self._ways(context, weights):
            change = self._along(context, weights, shrinking)
            for name in [group] if group else list(scores):
                found = unit_values(change, _named(context, name), None).double().cpu()
                scores[name] += found if unit is None else _only(found, unit)
        return {g.name: self.finish(self._signed(scores[g.name])).view(g.shape) for g in context.groups}

    def _signed(self, values: Tensor) -> Tensor:
        if self.negative == "keep":
            return values
        return values.clamp(min=0) if self.negative == "clip" else values.abs()

    def _ways(
        self, context: Context, weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[dict[str, Tensor], str, int | None]]:
        """What shrinks together (weight name -> bool tensor), and the group and unit that are scored by it."""
        owned = {g.name: _units_of(g, weights) for g in context.groups}
        if self.path == "joint":
            together: dict[str, Tensor] = {}
            for spans in owned.values():
                for name, unit in spans:
                    together[name] = together[name] | (unit >= 0) if name in together else unit >= 0
            yield together, "", None
            return
        for group in context.groups:
            for number in range(group.size) if self.path == "unit" else [None]:
                chosen: dict[str, Tensor] = {}
                for name, unit in owned[group.name]:
                    mask = unit >= 0 if number is None else unit == number
                    chosen[name] = chosen[name] | mask if name in chosen else mask
                yield chosen, group.name, number

    def _along(
        self, context: Context, weights: Mapping[str, Tensor], shrinking: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """-w_i times the integral of g_i, for the weights that shrink; 0 for the others."""
        total = {name: torch.zeros_like(accumulable(weights[name])) for name in shrinking}
        for place, share in _quadrature(self.steps):
            point = {n: torch.where(mask, weights[n] * place, weights[n]) for n, mask in shrinking.items()}
            gradient, samples = _gradient_at(context, point)
            for name, value in gradient.items():
                total[name].add_(value, alpha=share / samples)
        return {n: -value * accumulable(weights[n]) * shrinking[n] for n, value in total.items()}


def _gradient_at(context: Context, point: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Sum over the samples of the gradient at other weights, and the number of samples."""
    total: dict[str, Tensor] = {}
    samples = 0
    for number, (batch, size) in enumerate(walk(context)):
        samples += size
        leaves = {name: value.clone().requires_grad_() for name, value in point.items()}
        with exact_derivatives(context.model):
            loss = loss_value(context.model, loss_of(context), batch, leaves)
            require_finite_loss(loss, number)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), value in zip(leaves.items(), found, strict=True):
            more = accumulable(torch.zeros_like(leaf) if value is None else value) * size
            require_finite_gradient(more, name)
            total[name] = total[name] + more if name in total else more
    return total, samples


def _quadrature(steps: int) -> Steps:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1]."""
    nodes, shares = np.polynomial.legendre.leggauss(steps)
    return [((float(x) + 1) / 2, float(s) / 2) for x, s in zip(nodes, shares, strict=True)]


def _units_of(group: Group, weights: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    found = []
    for span in group.spans:
        if span.tensor in weights:
            weight = weights[span.tensor]
            found.append((span.tensor, span.units(weight).expand(weight.shape)))
    return found


def _named(context: Context, name: str) -> Group:
    return next(group for group in context.groups if group.name == name)


def _only(values: Tensor, unit: int) -> Tensor:
    chosen = torch.zeros_like(values)
    chosen[unit] = values[unit]
    return chosen
