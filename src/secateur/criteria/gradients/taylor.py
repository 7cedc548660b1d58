"""First-order Taylor expansion: what the loss would change if the unit were gone, by its slope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from secateur.criteria.base import Context, register
from secateur.criteria.gradients.loss_gradient import (
    CoupledCriterion,
    accumulable,
    unit_values,
    warn_if_stationary,
)
from secateur.criteria.gradients.unit_gradients import mean_over_samples
from secateur.criteria.sums import Reduction, reduce_spans
from secateur.model.guard import guard
from secateur.registry import one_of
from secateur.types import Group

REDUCTIONS = ("auto", "signed", "abs", "mean", "squared", "per-sample", "per-batch")


@register
@dataclass(frozen=True, kw_only=True)
class Taylor(CoupledCriterion):
    """Score a unit by the change of the loss that its slope predicts: g w, in one of six named ways.

    The idea: removing a weight changes the loss by about -g w, so weights with a small product matter least.
    Six different scores go by the name "Taylor" in the literature, so the name is an option here. A bad
    choice with the reductions of the mean gradient ("signed", "abs", "mean", "squared") on a network
    that is trained to the end: there the mean gradient vanishes, and with weight decay g = -lambda w makes
    the score lambda w^2, which is magnitude (`StationaryWarning`). "per-sample" does not vanish there.
    The slope says nothing about curvature: big removals are predicted badly by all of them.

    Formulas, with g the gradient of the mean loss, g_n that of sample n, g_b that of batch b, and sums over the
    weights i of the unit:

    * "signed": abs(sum g_i w_i); products may cancel, as they do in the true change;
    * "abs": sum abs(g_i w_i); "mean": the same divided by the number of weights of the unit;
    * "squared": sum (g_i w_i)^2;
    * "per-sample": mean_n (sum g_{n,i} w_i)^2, the Fisher information of a gate on the unit;
    * "per-batch": mean_b (sum g_{b,i} w_i)^2, batches weighted by their size; it depends on how the data is
      cut into batches, and tends to "signed" squared for large ones.

    The model runs in eval mode: behind a convolution with batch norm in train mode the sum of g w over
    a filter is zero, whatever the filter is worth.

    Args:
        reduce: one of the six names above, or "auto": "per-sample" where units lie along one dimension of the
            weights (channels, heads, neurons, rows), and "per-batch" for single weights, kernels and blocks,
            where gradients of every sample cost more than an epoch. For single weights "signed", "abs" and
            "mean" are the same.
        coupled: which weights count. "in", those that consume the unit: the derivative with respect to a
            gate on what is read, so that nothing is counted twice; "out", those that produce it, with bias
            and norm; "all". Groups that have none of the wanted kind count all.
        normalize: "none" compares predicted changes of the loss across layers, the honest default; "mean"
            and "l2" divide by the group's mean and L2 norm, as Molchanov 2017 does.
        frozen: "error" refuses parameters with requires_grad=False, "score" scores them all the same.
        unused: "error" refuses parameters that the loss never reaches, "zero" gives them the gradient 0.

    Raises:
        RecipeError: an unknown word, or no data.
        InputError: frozen or unused parameters; the message names them.
        NonFiniteError: the loss or a gradient is NaN or Inf.

    Cost:
        One forward and backward pass over the data; "per-sample" for channels, heads and neurons less than
        that (no weight gradients are needed), for single weights, kernels and blocks 2 to 4 passes.

    Source:
        Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network Pruning", 2019,
        equations 5 to 8 ("per-batch", "squared"); Molchanov et al., "Pruning Convolutional Neural Networks
        for Resource Efficient Inference", 2017, section 2.2 (layer-wise L2 normalisation).

    Example:
        >>> from secateur.types import Group, Span
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.fill_(1.0)
        >>> data = [torch.tensor([[0.5, -0.5, 0.1]])]  # the gradient of the output is the input
        >>> row = Group("row", "vector", (1,), (Span("weight", torch.tensor([[0]]), "self"),))
        >>> def first_order(reduce):
        ...     context = Context(layer, [row], data=data, loss=lambda model, x: model(x).mean())
        ...     return round(Taylor(reduce=reduce).score(context)["row"].item(), 4)
        >>> first_order("signed"), first_order("abs"), first_order("squared")
        (0.1, 1.1, 0.51)
    """

    name: ClassVar[str] = "taylor"
    summary: ClassVar[str] = "first-order estimate of the change of the loss: |g w|, in six named variants"
    speed: ClassVar[str] = "medium: one epoch over the scoring data"
    best_for: ClassVar[str] = "channels, heads and neurons of a trained network, across layers"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "zero_lowest"})
    shares: ClassVar[bool] = True

    reduce: Literal["auto", "signed", "abs", "mean", "squared", "per-sample", "per-batch"] = "auto"
    coupled: Literal["all", "out", "in"] = "in"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        one_of("reduce", self.reduce, REDUCTIONS)

    def _score(self, context: Context) -> dict[str, Tensor]:
        kinds: dict[str, list[Group]] = {}
        for group in context.groups:
            kinds.setdefault(self._kind(group), []).append(group)
        values: dict[str, Tensor] = {}
        for kind, groups in kinds.items():
            with guard(context.model):  # each kind finds the parameters as the user left them
                values |= self._of_kind(kind, replace(context, groups=groups))
        return {g.name: self.finish(values[g.name]).view(g.shape) for g in context.groups}

    def _of_kind(self, kind: str, context: Context) -> dict[str, Tensor]:
        parameters = self.trainable(context)
        if kind == "per-sample":
            return mean_over_samples(context, None, list(parameters), torch.square, unused=self.unused)
        if kind == "per-batch":
            return self.mean_over_batches(
                context, parameters, lambda product, group: unit_values(product, group, None).square()
            )
        return self._of_mean_gradient(context, parameters)

    def _kind(self, group: Group) -> str:
        if self.reduce != "auto":
            return self.reduce
        indices = [span.index for span in group.spans]
        # What a row or column of a layer loses can be read off its inputs and slopes, sample by sample. Units that
        # vary along several dimensions would need the whole gradient of every sample.
        along_one = all(i is not None and sum(size != 1 for size in i.shape) <= 1 for i in indices)
        return "per-sample" if along_one else "per-batch"

    def _of_mean_gradient(self, context: Context, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        weights = {name: accumulable(parameter) for name, parameter in parameters.items()}
        gradient = self.mean_gradient(context)
        warn_if_stationary(gradient, weights, context.groups)
        product = {name: gradient[name] * weight for name, weight in weights.items()}
        if self.reduce == "signed":
            return {g.name: unit_values(product, g, None).abs() for g in context.groups}
        power = 2.0 if self.reduce == "squared" else 1.0
        parts = {name: value.abs().pow(power) for name, value in product.items()}
        how: Reduction = "mean" if self.reduce == "mean" else "sum"
        return {g.name: reduce_spans(parts, g, how).flatten() for g in context.groups}
