"""GraSP: keep the weights that the flow of the gradient needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, register
from secateur.criteria.gradients.loss_gradient import (
    CoupledCriterion,
    accumulable,
    loss_of,
    require_finite_gradient,
    unit_values,
    walk,
)
from secateur.model.share import over_processes
from secateur.registry import one_of
from secateur.statistics.gradients.per_sample import hessian_vector_product


@register
@dataclass(frozen=True, kw_only=True)
class Grasp(CoupledCriterion):
    """Score a weight by w * (H g): how much the norm of the gradient would shrink without it.

    The idea: to first order, removing weight q changes ||g||^2 by 2 S_q with S = -w * (H g). Before training a
    large gradient means fast learning, so the authors remove the weights with the *largest* S, whose
    removal raises the norm most; the score kept here is -S, so that higher = keep as everywhere. Many
    implementations flip this sign. A bad choice after training (the gradient is noise), and it loses to
    SNIP and to random removal on some networks; keeping the largest |w * (H g)| does better.

    Formula: s_u = sum of w_i (H g)_i over the weights of the unit, with g and H of the mean loss over all
    data: g from a first walk through the data, H g from a second one.

    Args:
        keep: "published" the signed score above; "largest" its absolute value.
        coupled: "all" weights that go with the unit, "out" the producing ones, "in" the consuming ones.
        normalize: "none", as published; "mean" and "l2" divide by the group's mean |score| and L2 norm.
        frozen: "error" refuses parameters with requires_grad=False, "score" scores them all the same.
        unused: "error" refuses parameters that the loss never reaches, "zero" gives them the gradient 0.

    Raises:
        RecipeError: an unknown word, or no data.
        InputError: frozen or unused parameters; the message names them.
        NonFiniteError: the loss, a gradient or a product is NaN or Inf.

    Cost:
        Two walks through the data: one forward and backward pass, and one with a double backward pass (about
        three backward passes). The softmax temperature of the authors' code only scales all scores.

    Source:
        Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020,
        equation 8; "largest": Frankle, Dziugaite, Roy, Carbin, "Pruning Neural Networks at Initialization: Why
        Are We Missing the Mark?", 2021.

    Example:
        L = 2 w0^2 + w1^2 / 2 has the gradient (4 w0, w1) and the Hessian diag(4, 1).

        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, 3.0]]))
        >>> group = Group("weight", "element", (1, 2), (Span("weight", None, "self"),))
        >>> def loss(model, batch):
        ...     return (model.weight.square() * batch).sum() / 2
        >>> Grasp().score(Context(layer, [group], data=[torch.tensor([[4.0, 1.0]])], loss=loss))["weight"]
        tensor([[4., 9.]])
    """

    name: ClassVar[str] = "grasp"
    summary: ClassVar[str] = "keep the weights without which the gradient's norm shrinks: w * (H g)"
    speed: ClassVar[str] = "medium: three to five epochs over the scoring data"
    best_for: ClassVar[str] = "pruning before training"
    comparable: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split"})

    keep: Literal["published", "largest"] = "published"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        one_of("keep", self.keep, ("published", "largest"))

    def _score(self, context: Context) -> dict[str, Tensor]:
        gradient = self.mean_gradient(context)
        weights = {name: accumulable(weight) for name, weight in self.weights(context).items()}
        product = self._hessian_times(context, gradient)
        flow = {name: weights[name] * value for name, value in product.items()}
        scores = {g.name: unit_values(flow, g, None) for g in context.groups}
        if self.keep == "largest":
            scores = {name: score.abs() for name, score in scores.items()}
        return {g.name: self.finish(scores[g.name]).view(g.shape) for g in context.groups}

    def _hessian_times(self, context: Context, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = dict(context.model.named_parameters())
        vector = {name: value.to(parameters[name].dtype) for name, value in vector.items()}
        total = {name: torch.zeros_like(accumulable(value)) for name, value in vector.items()}
        samples = 0
        for batch, size in walk(context):
            samples += size
            found = hessian_vector_product(context.model, loss_of(context), batch, list(vector), vector)
            for name, value in found.items():
                total[name].add_(accumulable(value), alpha=size)
        total, samples = over_processes(context.data, total, samples)
        for name, value in total.items():
            require_finite_gradient(value, name)
        return {name: value / samples for name, value in total.items()}
