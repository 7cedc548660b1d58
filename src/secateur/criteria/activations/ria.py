"""RIA: relative importance of a weight in its row and column, times a power of the input norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.activations.wanda import inputs_of
from secateur.criteria.base import Context, Criterion, register
from secateur.errors import RecipeError

TINY = 1e-300


@register
@dataclass(frozen=True, kw_only=True)
class RIA(Criterion):
    """Score a weight by (|w_ij| / sum_j |w_ij| + |w_ij| / sum_i |w_ij|) ||x_j||_2^power.

    The idea: Wanda removes whole input features whose norm or weights are small; weights relative to their row
    and column keep every feature and every output alive. A bad choice where whole features are useless and
    should go; and for units of several weights, whose scores then say how many weights they have.

    In a convolution the row is the filter, the column one input channel at one place of the kernel.

    Args:
        power: exponent of the input norm; 0 leaves the data out, 1 weighs it as Wanda does.

    Raises:
        RecipeError: power is negative, no data, or a group without a weight matrix.
        UnsupportedError: a weight that multiplies no activation; names it.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        One forward pass over the data; one number per input channel is kept.

    Source:
        Zhang, Bai, Lin, Wang, Hu, Sha, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
        Language Models", 2024, equations 2 and 4 (power 0.5).

    Example:
        >>> import torch
        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
        >>> group = Group("weight", "element", (2, 2), (Span("weight", None, "self"),))
        >>> RIA().score(Context(layer, [group], data=[torch.tensor([[1.0, 4.0]])]))["weight"]
        tensor([[1.5000, 1.5000],
                [0.7500, 2.0000]])
    """

    name: ClassVar[str] = "ria"
    summary: ClassVar[str] = "weights that are small in their row and column, on small inputs, matter least"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "fast: a forward pass, no labels"
    best_for: ClassVar[str] = "weights and n:m patterns of language models, without fine-tuning"
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True

    power: float = 0.5

    def __post_init__(self) -> None:
        """Refuse negative powers."""
        if not self.power >= 0:
            raise RecipeError(f"power={self.power!r} is negative", hint="0.5 is the published value")

    def contributions(self, context: Context) -> dict[str, Tensor]:
        """Relative importance times the input norm to the power, float64."""
        weights, found = self.weights(context), inputs_of(context, self)
        return {
            name: relative_importance(weights[name], x.outputs, x.groups)
            * x.norm.to(weights[name].device) ** self.power
            for name, x in found.items()
        }


def relative_importance(weight: Tensor, outputs: int = 0, groups: int = 1) -> Tensor:
    """|w| over the sum of its row plus |w| over the sum of its column; 0 where the weight is 0.

    Args:
        weight: any layout.
        outputs: dimension of the outputs; the row of a weight is everything with the same index there.
        groups: groups of the convolution, whose outputs have columns of their own.
    """
    magnitude = weight.double().abs()
    if outputs == 1 and groups > 1:  # a transposed convolution: the groups lie along the inputs
        parts = [relative_importance(part, 1) for part in weight.chunk(groups)]
        return torch.cat(parts)
    row = magnitude.sum([d for d in range(magnitude.dim()) if d != outputs], keepdim=True)
    blocks = magnitude.chunk(groups, outputs)
    column = torch.cat([block.sum(outputs, keepdim=True).expand_as(block) for block in blocks], outputs)
    both: Tensor = magnitude / row.clamp(min=TINY) + magnitude / column.clamp(min=TINY)
    return both
