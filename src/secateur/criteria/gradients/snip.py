"""SNIP: connection sensitivity at initialisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from secateur.criteria.base import Context, register
from secateur.criteria.gradients.loss_gradient import CoupledCriterion, accumulable, unit_values
from secateur.registry import one_of


@register
@dataclass(frozen=True, kw_only=True)
class Snip(CoupledCriterion):
    """Score a weight by |g w| at initialisation: how much the loss reacts to a mask on the connection.

    The idea: with a mask c on the weights, dL/dc = g w at c = 1, so one batch tells which connections matter
    before any training. Give a batch with all classes alike, and prune before the first step. A bad choice
    for very sparse networks, where whole layers are lost (SynFlow is not), and on trained networks, where
    it is Taylor "abs" with all its traps. Pruning at initialisation in general stays below magnitude after
    training, and the masks work as well when shuffled within layers: what is learnt are the layers' ratios.

    Args:
        reduce: of a unit with several weights, "abs" is the sum of |g w|, "signed" |sum of g w|, the
            sensitivity to one mask variable on the whole unit.
        share: divide by the sum over everything scored in this call, as published, for display; the order
            is the same.
        coupled: "all" weights that go with the unit, "out" the producing ones, "in" the consuming ones.
        normalize: "none", as published; "mean" and "l2" divide by the group's mean and L2 norm.
        frozen: "error" refuses parameters with requires_grad=False, "score" scores them all the same.
        unused: "error" refuses parameters that the loss never reaches, "zero" gives them the gradient 0.

    Raises:
        RecipeError: an unknown word, or no data.
        InputError: frozen or unused parameters; the message names them.
        NonFiniteError: the loss or a gradient is NaN or Inf.

    Cost:
        One forward and backward pass over the data; a batch of some hundred samples is enough.

    Source:
        Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019,
        equations 4 to 6.

    Example:
        >>> import torch
        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> group = Group("weight", "element", (1, 2), (Span("weight", None, "self"),))
        >>> data = [torch.tensor([[0.5, 3.0]])]
        >>> Snip().score(Context(layer, [group], data=data, loss=lambda m, x: m(x).mean()))["weight"]
        tensor([[1., 3.]])
    """

    name: ClassVar[str] = "snip"
    summary: ClassVar[str] = "reaction of the loss to a mask on each connection at initialisation: |g w|"
    speed: ClassVar[str] = "fast: one batch is enough"
    best_for: ClassVar[str] = "pruning before training, at moderate sparsity"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True

    reduce: Literal["abs", "signed"] = "abs"
    share: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        one_of("reduce", self.reduce, ("abs", "signed"))

    def _score(self, context: Context) -> dict[str, Tensor]:
        gradient, weights = self.mean_gradient(context), self.weights(context)
        product = {name: value * accumulable(weights[name]) for name, value in gradient.items()}
        if self.reduce == "abs":
            product = {name: value.abs() for name, value in product.items()}
        scores = {g.name: self.finish(unit_values(product, g, None).abs()) for g in context.groups}
        total = sum(float(score.double().sum()) for score in scores.values()) if self.share else 1.0
        return {g.name: (scores[g.name] / (total or 1.0)).view(g.shape) for g in context.groups}
