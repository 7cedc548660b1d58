"""Activation variance: a unit that is nearly constant on the data can be replaced by its mean."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from secateur.criteria.activations.mean_activation import consumers
from secateur.criteria.base import Context, Criterion, register
from secateur.statistics.activations.streams import Moments, finite, gather, mean_of_sites, per_unit
from secateur.words import SLICES

POOLED = ("channel", "neuron")  # positions of these units are places in space; else they are features


@register
@dataclass(frozen=True, kw_only=True)
class ActivationVariance(Criterion):
    """Score a unit by the variance of what its consumers read, over samples and positions.

    The idea: a constant channel carries no information; the next bias can stand in for it. A bad choice
    without anything that corrects the mean afterwards (constant folding, least squares, batch-norm refresh,
    fine-tuning): a large constant that is dropped shifts everything behind it.

    A head, head dimension or convolution group is the mean over its features of their variances.

    Raises:
        RecipeError: no data.
        UnsupportedError: nothing sums over the units of a group.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        One forward pass over the data; two numbers per channel are kept.

    Source:
        Polyak, Wolf, "Channel-Level Acceleration of Deep Face Representations", 2015, section III
        (inbound pruning by the variance of the channel's contribution).

    Example:
        >>> from secateur.types import Group, Span
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> inputs = Group("inputs", "neuron", (2,), (Span("weight", torch.tensor([[0, 1]]), "in"),))
        >>> data = [torch.tensor([[5.0, -1.0]]), torch.tensor([[5.0, 3.0]])]
        >>> ActivationVariance().score(Context(net, [inputs], data=data))["inputs"]
        tensor([0., 4.])
    """

    name: ClassVar[str] = "activation-variance"
    summary: ClassVar[str] = "units that are nearly constant on the data matter least: Var a"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "fast: a forward pass, no labels"
    best_for: ClassVar[str] = "cuts that are followed by constant folding, least squares or fine-tuning"
    granularities: ClassVar[tuple[str, ...]] = SLICES
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True

    def _score(self, context: Context) -> dict[str, Tensor]:
        assert context.data is not None
        _, found = gather(
            context.model,
            context.data,
            lambda trace: consumers(context.groups, trace),
            lambda _: Moments(),
            trace=context.capture,
            progress=context.progress,
        )
        groups = {group.name: group for group in context.groups}
        parts = defaultdict(list)
        for site, statistic in found.items():
            group, moments = groups[site.group], cast(Moments, statistic)
            # A channel of a convolution has one position here, a head or a flattened channel several.
            within, positions = per_unit(finite(moments.squares) / moments.count, site.unit, group.size)
            variance = within / positions.clamp(min=1)
            # Here all positions of a unit are samples of one thing, so the spread between them is variance as well.
            if group.granularity in POOLED:
                variance = variance + _between(moments.mean, site.unit, group.size)
            parts[site.group].append((variance, positions))
        return mean_of_sites(context.groups, parts)


def _between(mean_p: Tensor, unit: Tensor, size: int) -> Tensor:
    """Variance of the position means within each unit."""
    total, positions = per_unit(mean_p, unit, size)
    centre = total / positions.clamp(min=1)
    # Positions that no unit owns take part below as well, and fall out again in `per_unit`.
    own = torch.where(unit >= 0, centre[unit.clamp(min=0)], 0.0)
    squares, _ = per_unit((mean_p.cpu() - own).square(), unit, size)
    return squares / positions.clamp(min=1)
