"""APoZ: average percentage of zeros behind the ReLU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from secateur.criteria.activations.mean_activation import consumers
from secateur.criteria.base import Context, Criterion, register
from secateur.errors import RecipeError, UnsupportedError
from secateur.model.call import require_reiterable
from secateur.statistics.activations.observe import Site, result_sites
from secateur.statistics.activations.streams import Norms, Statistic, Zeros, gather, mean_of_sites, per_unit
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Step, Trace
from secateur.words import SLICES


@register
@dataclass(frozen=True, kw_only=True)
class APoZ(Criterion):
    """Score a unit by 1 - APoZ: how often its activation behind the ReLU is not zero.

    The idea: a neuron that is nearly always off is redundant. Every ReLU (also ReLU6, squared or thresholded
    at zero, hard swish) whose result holds the unit is looked at, before pooling; several of them (along a
    residual stream) count alike. A bad choice for units that fire rarely but then decide, and for anything but
    ReLU: GELU and SiLU are never exactly zero. There it refuses, unless `epsilon` says what counts as zero.

    Args:
        epsilon: 0 counts exact zeros behind ReLU. Above 0, |a| <= epsilon times the root mean square of the
            layer counts as zero, in what the consumers read, whatever the nonlinearity is.

    Raises:
        RecipeError: epsilon is not in [0, 1), or there are no data.
        UnsupportedError: epsilon is 0 and no ReLU follows the units of a group.
        InputError: epsilon is above 0 and the data can be read only once.

    Cost:
        One forward pass over the data, two with `epsilon`; one int64 count per channel is kept.

    Source:
        Hu, Peng, Tai, Tang, "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
        Architectures", 2016, equation 1.

    Example:
        >>> import torch
        >>> from secateur.types import Group, Span
        >>> net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False))
        >>> inputs = Group("inputs", "neuron", (2,), (Span("1.weight", torch.tensor([[0, 1]]), "in"),))
        >>> data = [torch.tensor([[1.0, -1.0], [3.0, -2.0]]), torch.tensor([[-1.0, 5.0], [2.0, 0.0]])]
        >>> APoZ().score(Context(net, [inputs], data=data))["inputs"]
        tensor([0.7500, 0.2500])
    """

    name: ClassVar[str] = "apoz"
    summary: ClassVar[str] = "units that are zero behind the ReLU most of the time matter least: 1 - APoZ"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "fast: a forward pass, no labels"
    best_for: ClassVar[str] = "ReLU networks with dead or nearly dead channels"
    granularities: ClassVar[tuple[str, ...]] = SLICES
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True
    complex_weights: ClassVar[bool] = True

    epsilon: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an epsilon that is no fraction."""
        if not 0 <= self.epsilon < 1:
            raise RecipeError(f"epsilon={self.epsilon!r} is not in [0, 1)")

    def _score(self, context: Context) -> dict[str, Tensor]:
        counts = self._near_zero(context) if self.epsilon else self._exactly_zero(context)
        sizes = {group.name: group.size for group in context.groups}
        parts = defaultdict(list)
        for site, statistic in counts.items():
            zeros = cast(Zeros, statistic)
            assert zeros.zeros is not None
            total, positions = per_unit(zeros.zeros, site.unit, sizes[site.group])
            # Every position has seen as many activations as any other, so one count serves all.
            parts[site.group].append((1 - total / (positions.clamp(min=1) * zeros.count), positions))
        return mean_of_sites(context.groups, parts)

    def _exactly_zero(self, context: Context) -> dict[Site, Statistic]:
        assert context.data is not None
        return gather(
            context.model,
            context.data,
            lambda trace: _behind_relu(context, trace),
            lambda _: Zeros(),
            trace=context.capture,
            progress=context.progress,
        )[1]

    def _near_zero(self, context: Context) -> dict[Site, Statistic]:
        assert context.data is not None
        # Two walks: what counts as nearly zero is known only when the scale is.
        require_reiterable(context.data, "epsilon, which is relative to the scale of the layer,")
        trace, norms = gather(
            context.model,
            context.data,
            lambda trace: consumers(context.groups, trace),
            lambda _: Norms(2),
            trace=context.capture,
        )
        bounds = {}
        for site, statistic in norms.items():
            norm = cast(Norms, statistic)
            # Over the positions of units only: others (a concatenation) belong to another layer.
            mean = float(norm.sums()[(site.unit >= 0).to(norm.sums().device)].mean()) / norm.count
            # The root mean square, since the mean of |a| itself is near zero where most activations are.
            bounds[site] = self.epsilon * mean**0.5
        return gather(
            context.model,
            context.data,
            lambda _: list(bounds),
            lambda site: Zeros(bounds[site]),
            trace=trace,
            progress=context.progress,
        )[1]


def _behind_relu(context: Context, trace: Trace) -> list[Site]:
    sites = result_sites(trace, context.groups, is_relu)
    found = {site.group for site in sites}
    for group in context.groups:
        if group.name not in found:
            raise UnsupportedError(
                f"no ReLU follows the units of group {group.name!r}",
                why="APoZ counts exact zeros, which GELU, SiLU and linear outputs do not give",
                hint="give epsilon (for example 0.01: |a| below 1 % of the layer's scale), use criterion "
                "'mean-activation', or protect the group",
            )
    return sites


def is_relu(step: Step) -> bool:
    """Whether a call cuts off at zero, so that exact zeros occur in what it returns."""
    name, args = base_name(step.func), step.args

    def is_zero(position: int, key: str) -> bool:
        value = args[position] if len(args) > position else step.kwargs.get(key)
        return isinstance(value, (int, float)) and value == 0

    # Named by the operator that runs, not by the module: functional and in-place forms are the same here.
    if name in ("relu", "relu6", "hardswish"):
        return True
    if name in ("hardtanh", "clamp_min"):
        return is_zero(1, "min_val" if name == "hardtanh" else "min")
    if name == "clamp":
        return is_zero(1, "min")
    # Two arguments: below the one it gives the other, and only zero for zero is a ReLU.
    return name == "threshold" and is_zero(1, "threshold") and is_zero(2, "value")
