"""Magnitude: small weights matter least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion, Reads, register
from secateur.criteria.sums import Reduction
from secateur.registry import one_of


@register
@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """Score a unit by the p-norm of its weights; an element by its absolute value.

    The idea: where inputs have similar scale, a weight near zero adds little to the output. It needs no data
    and is hard to beat once the network is fine-tuned. A bad choice where scale says nothing: in front of a
    batch norm a filter may be multiplied by any number without changing the network, so do not compare such
    filters across layers (scope "global"); and without fine-tuning a criterion that sees data keeps more.

    Args:
        norm: "l1" sum of |w|, "l2" root of the sum of squares, "linf" largest |w|.
        reduce: "sum" is the norm itself and favours units with many weights when layers compete; "mean"
            divides it by n^(1/p), n the number of weights of the unit, and favours small units (for "linf"
            both are the same).
        coupled: "all" counts every weight that goes with the unit, "out" only those that produce it. Units
            of granularity element, vector, kernel and block have no other weights.

    Raises:
        RecipeError: an option is not one of the words above.

    Cost:
        One pass over the weights; no data, no gradients.

    Source:
        Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015,
        section 3 (elements); Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets",
        2017, section 3.1 (L1 norm of a filter).

    Example:
        The row (3, -2) has the L2 norm 3.61, the row (1, -5) has 5.10: the first goes first.

        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -2.0], [1.0, -5.0]]))
        >>> rows = Group("rows", "vector", (2,), (Span("weight", torch.tensor([[0], [1]]), "self"),))
        >>> Magnitude(norm="l2").score(Context(layer, [rows]))["rows"]
        tensor([3.6056, 5.0990])
        >>> element = Group("weight", "element", (2, 2), (Span("weight", None, "self"),))
        >>> Magnitude().score(Context(layer, [element]))["weight"]
        tensor([[3., 2.],
                [1., 5.]])
    """

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "small weights matter least: |w|, or the norm of a group of weights"
    speed: ClassVar[str] = "fastest: no data"
    best_for: ClassVar[str] = "a first try, n:m patterns, and every pruning that is followed by fine-tuning"
    reads: ClassVar[Reads] = "sums"
    complex_weights: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})

    norm: Literal["l1", "l2", "linf"] = "l2"
    reduce: Literal["sum", "mean"] = "sum"
    coupled: Literal["all", "out"] = "all"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        one_of("norm", self.norm, ("l1", "l2", "linf"))
        one_of("reduce", self.reduce, ("sum", "mean"))
        one_of("coupled", self.coupled, ("all", "out"))

    @property
    def reduction(self) -> Reduction:
        """The maximum for "linf", else as asked."""
        return "max" if self.norm == "linf" else self.reduce

    @property
    def squared(self) -> bool:
        """For the L2 norm."""
        return self.norm == "l2"

    @property
    def roles(self) -> frozenset[str] | None:
        """The producing weights, or all."""
        return frozenset({"out", "self"}) if self.coupled == "out" else None

    def contributions(self, context: Context) -> dict[str, Tensor]:
        """|w|, or w itself for the L2 norm, whose squares are summed without being stored."""
        weights = self.weights(context)
        if self.norm == "l2":
            return {name: weight.abs() if weight.is_complex() else weight for name, weight in weights.items()}
        return {name: weight.abs().to(torch.float32) for name, weight in weights.items()}

    def finish(self, values: Tensor) -> Tensor:
        """The root, for the L2 norm."""
        return values.sqrt() if self.norm == "l2" else values
