"""Wanda: |w| times the norm of the input that it multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.base import Context, Criterion, register
from secateur.criteria.sums import counts
from secateur.errors import RecipeError
from secateur.statistics.activations.input_norms import Inputs, input_norms


def inputs_of(context: Context, criterion: Criterion) -> dict[str, Inputs]:
    """The inputs of the weights that count for some group: biases and the vectors of norms multiply no input.

    Raises:
        RecipeError: a group without a weight matrix.
        UnsupportedError: a weight that multiplies no activation.
    """
    assert context.data is not None
    weights = criterion.weights(context)
    names = [name for name, weight in weights.items() if weight.dim() > 1]
    for group in context.groups:
        if not any(s.tensor in names and counts(s.role, criterion.roles) for s in group.spans):
            raise RecipeError(
                f"group {group.name!r} has no weight matrix, so {criterion.name!r} has nothing to score",
                hint="protect the group, or use criterion 'mean-activation'",
            )
    return input_norms(context.model, context.data, names, trace=context.capture, progress=context.progress)


@register
@dataclass(frozen=True, kw_only=True)
class Wanda(Criterion):
    """Score a weight by |w_ij| ||x_j||_2, x_j the input that it multiplies, over samples and positions.

    The idea: in a transformer a few input features are a hundred times larger than the others, and small
    weights on them matter more than large weights on the rest. Compare within a row (scope "row"), as
    published: all weights of a row add up to the same output. A bad choice globally, because the norm grows
    with the scale of the layer's input; and above 60 % sparsity without an update of the weights.

    A unit of several weights is the sum over its weight matrices; biases and norms do not count. Convolutions
    have one norm per input channel, over batch and space.

    Raises:
        RecipeError: no data, or a group without a weight matrix.
        UnsupportedError: a weight that multiplies no activation; names it.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        One forward pass over the data; one number per input channel is kept.

    Source:
        Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2024,
        equation 1.

    Example:
        >>> import torch
        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, -1.0]]))
        >>> group = Group("weight", "element", (1, 2), (Span("weight", None, "self"),))
        >>> Wanda().score(Context(layer, [group], data=[torch.tensor([[0.5, 6.0], [0.0, 8.0]])]))["weight"]
        tensor([[ 2., 10.]])
    """

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "small weights on small inputs matter least: |w| ||x||"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "fast: a forward pass, no labels"
    best_for: ClassVar[str] = "weights and n:m patterns of language models, scope row, without fine-tuning"
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True

    def contributions(self, context: Context) -> dict[str, Tensor]:
        """|w_ij| ||x_j||, float64 on the weights' device."""
        weights = self.weights(context)
        found = inputs_of(context, self)
        return {name: weights[name].double().abs() * x.norm.to(weights[name].device) for name, x in found.items()}
