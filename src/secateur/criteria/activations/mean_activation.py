"""Mean activation: a unit whose output is small on the data matters little."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from torch import Tensor

from secateur.criteria.base import Context, Criterion, register
from secateur.registry import one_of
from secateur.statistics.activations.observe import Site, consumer_sites, distinct
from secateur.statistics.activations.streams import Norms, gather, mean_of_sites, per_unit
from secateur.structure.trace import Trace
from secateur.types import Group
from secateur.words import SLICES


def consumers(groups: Sequence[Group], trace: Trace) -> list[Site]:
    """What the consumers of the groups read, every tensor once."""
    return distinct(trace, consumer_sites(trace, groups))


@register
@dataclass(frozen=True, kw_only=True)
class MeanActivation(Criterion):
    """Score a unit by the mean |a| of what its consumers read, over samples and positions.

    The idea: what is near zero on the data adds little to the next layer. It looks behind the batch norm and
    the nonlinearity, so the scale of a filter in front of a norm does not fool it. A bad choice where the
    consumer's weights undo the scale, and where activations have a large constant part: a channel that is
    always 1 says nothing but scores high (use "activation-variance").

    Args:
        norm: "l1" mean of |a|, "l2" root of the mean of a squared.

    Raises:
        RecipeError: an unknown word, or no data.
        UnsupportedError: nothing sums over the units of a group.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        One forward pass over the data; one number per channel is kept. A tensor that several consumers read
        counts once; different tensors (along a residual stream) count alike.

    Source:
        Polyak, Wolf, "Channel-Level Acceleration of Deep Face Representations", 2015, section III;
        Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for Resource Efficient
        Inference", 2017, section 2.2.

    Example:
        >>> import torch
        >>> from secateur.types import Span
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> inputs = Group("inputs", "neuron", (2,), (Span("weight", torch.tensor([[0, 1]]), "in"),))
        >>> data = [torch.tensor([[1.0, -4.0], [-3.0, 0.0]])]
        >>> MeanActivation().score(Context(net, [inputs], data=data))["inputs"]
        tensor([2., 2.])
    """

    name: ClassVar[str] = "mean-activation"
    summary: ClassVar[str] = "units whose output is small on the data matter least: mean |a|"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "fast: a forward pass, no labels"
    best_for: ClassVar[str] = "networks with ReLU or GELU, and data without labels"
    granularities: ClassVar[tuple[str, ...]] = SLICES
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True
    complex_weights: ClassVar[bool] = True

    norm: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        one_of("norm", self.norm, ("l1", "l2"))

    def _score(self, context: Context) -> dict[str, Tensor]:
        assert context.data is not None
        power = 1 if self.norm == "l1" else 2
        _, found = gather(
            context.model,
            context.data,
            lambda trace: consumers(context.groups, trace),
            lambda _: Norms(power),
            trace=context.capture,
            progress=context.progress,
        )
        sizes = {group.name: group.size for group in context.groups}
        parts = defaultdict(list)
        for site, statistic in found.items():
            norms = cast(Norms, statistic)
            total, positions = per_unit(norms.sums(), site.unit, sizes[site.group])
            # Mean over the positions of the unit too: a head with many features is not larger for having them.
            mean = total / (positions.clamp(min=1) * norms.count)
            parts[site.group].append((mean if power == 1 else mean.sqrt(), positions))
        return mean_of_sites(context.groups, parts)
