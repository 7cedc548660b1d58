"""Gradient magnitude: a weight that the loss does not react to matters least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from secateur.criteria.base import Context, register
from secateur.criteria.gradients.loss_gradient import CoupledCriterion
from secateur.criteria.sums import Reduction
from secateur.registry import one_of


@register
@dataclass(frozen=True, kw_only=True)
class Gradient(CoupledCriterion):
    """Score a unit by the size of the gradient of the mean loss: |g|, or its norm over the unit.

    The idea: where the loss is flat, nothing is lost. It is the rule by which dynamic sparse training grows
    weights back (a removed weight has no magnitude, but it has a gradient). A bad choice for removing weights
    of a trained network: the size of the step that removal makes, w, is left out, and at an optimum the mean
    gradient is noise. Use "taylor" there.

    Args:
        norm: "l1" sum of |g|, "l2" root of the sum of squares, over the weights of the unit.
        reduce: "sum" is the norm; "mean" divides it by n^(1/p), n the number of weights of the unit.
        coupled: "all" weights that go with the unit, "out" the producing ones, "in" the consuming ones.
        normalize: "none"; "mean" and "l2" divide by the group's mean and L2 norm. Gradients grow with
            the inverse scale of the weights, so normalise before layers compete.
        frozen: "error" refuses parameters with requires_grad=False, "score" scores them all the same.
        unused: "error" refuses parameters that the loss never reaches, "zero" gives them the gradient 0.

    Raises:
        RecipeError: an unknown word, or no data.
        InputError: frozen or unused parameters; the message names them.
        NonFiniteError: the loss or a gradient is NaN or Inf.

    Cost:
        One forward and backward pass over the data.

    Source:
        Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", 2020, section 3
        (the growth criterion).

    Example:
        >>> import torch
        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> group = Group("weight", "element", (1, 2), (Span("weight", None, "self"),))
        >>> data = [torch.tensor([[0.5, -3.0], [0.5, -1.0]])]  # the gradient is the mean input
        >>> Gradient().score(Context(layer, [group], data=data, loss=lambda m, x: m(x).mean()))["weight"]
        tensor([[0.5000, 2.0000]])
    """

    name: ClassVar[str] = "gradient"
    summary: ClassVar[str] = "weights to which the loss does not react (small |g|) matter least"
    speed: ClassVar[str] = "medium: one epoch over the scoring data"
    best_for: ClassVar[str] = "growing weights back; as a control of taylor"
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split"})
    shares: ClassVar[bool] = True
    complex_weights: ClassVar[bool] = True

    norm: Literal["l1", "l2"] = "l1"
    reduce: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        one_of("norm", self.norm, ("l1", "l2"))
        one_of("reduce", self.reduce, ("sum", "mean"))

    @property
    def reduction(self) -> Reduction:
        """As asked."""
        return self.reduce

    def contributions(self, context: Context) -> dict[str, Tensor]:
        """|g|, or g squared for the L2 norm (in float64: the square of a small float32 fits)."""
        gradient = self.mean_gradient(context)
        if self.norm == "l2":
            return {name: value.abs().double().square() for name, value in gradient.items()}
        return {name: value.abs() for name, value in gradient.items()}

    def finish(self, values: Tensor) -> Tensor:
        """The root, for the L2 norm."""
        return super().finish(values.sqrt() if self.norm == "l2" else values)
