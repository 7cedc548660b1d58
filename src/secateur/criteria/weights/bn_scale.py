"""Scale of the norm: a channel that its batch norm multiplies by almost nothing matters least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion, register
from secateur.criteria.sums import reduce_spans
from secateur.errors import RecipeError
from secateur.registry import listed, one_of
from secateur.types import Group

_KEPT = 1e30  # above every gamma, and sums of it stay within float32


@register
@dataclass(frozen=True, kw_only=True)
class NormScale(Criterion):
    """Score a channel by |gamma|, the factor that its batch norm (or another norm with a weight) gives it.

    The idea: after a batch norm every channel has variance gamma^2, so gammas are comparable between channels
    and between layers, unlike the weights in front of the norm. It was made for networks trained with an L1
    penalty on gamma; without that penalty gammas are seldom near zero and their order says less. A bad choice
    where beta is large: a channel with gamma = 0 still emits the constant activation(beta), which has to be
    folded into the next layer; and for norms over channels (LayerNorm, RMSNorm), where gamma is a factor
    after a mixture of all channels and not the channel's spread.

    Args:
        reduce: how the gammas of a unit that has several are put together (a residual stream is written by
            several batch norms; a head has one per feature). "l2", the root of the sum of squares, is the
            standard deviation of a sum of independent normalised branches; "mean", "max" and "sum" are of
            |gamma|. With one gamma all are the same.
        missing: what to do with units that no norm scales. "error" refuses them, because no number of theirs
            would be comparable; "keep" gives them 1e30, so that a global ranking keeps them
            (a ranking within such a group is then by index alone: protect it instead).

    Raises:
        RecipeError: units without a gamma and missing="error"; the message names the groups.

    Cross-layer normalisation:
        None: gammas are in units of standard deviations of normalised activations.

    Cost:
        One pass over the norms' weights; no data.

    Source:
        Liu, Li, Shen, Huang, Yan, Zhang, "Learning Efficient Convolutional Networks through Network
        Slimming", 2017, section 3 (equation 1 is the penalty to train with).

    Example:
        Half of the channels with gammas 1.17, 0.10, 0.29 and 0.82: channels 0 and 3 stay.

        >>> from secateur.types import Group, Span
        >>> norm = torch.nn.BatchNorm1d(4)
        >>> _ = norm.weight.data.copy_(torch.tensor([1.17, -0.10, 0.29, 0.82]))
        >>> group = Group("norm", "channel", (4,), (Span("weight", torch.arange(4), "scale"),))
        >>> NormScale().score(Context(norm, [group]))["norm"]
        tensor([1.1700, 0.1000, 0.2900, 0.8200])
    """

    name: ClassVar[str] = "bn-scale"
    summary: ClassVar[str] = "channels that their batch norm scales down (small |gamma|) matter least"
    speed: ClassVar[str] = "fastest: no data"
    best_for: ClassVar[str] = "channels of networks trained with an L1 penalty on the batch-norm scales"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "zero_lowest"})

    reduce: Literal["l2", "mean", "max", "sum"] = "l2"
    missing: Literal["error", "keep"] = "error"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        one_of("reduce", self.reduce, ("l2", "mean", "max", "sum"))
        one_of("missing", self.missing, ("error", "keep"))

    @property
    def roles(self) -> frozenset[str] | None:
        """The weights of norms."""
        return frozenset({"scale"})

    def _score(self, context: Context) -> dict[str, Tensor]:
        scales = self.weights(context)
        absent = {group.name: _without(group, scales) for group in context.groups}
        named = [name for name, units in absent.items() if bool(units.any())]
        if named and self.missing == "error":
            raise RecipeError(
                f"no norm scales the units of {listed(named)}",
                why=f"{self.name!r} scores channels by the weight of their norm",
                hint="protect these layers, insert gates (criterion 'gate'), or set missing='keep'",
            )
        return {g.name: self._of(g, scales, absent[g.name]) for g in context.groups}

    def _of(self, group: Group, scales: dict[str, Tensor], absent: Tensor) -> Tensor:
        if bool(absent.all()):
            return torch.full(group.shape, _KEPT)
        values = {name: scale.to(torch.float64).abs() for name, scale in scales.items()}
        if self.reduce == "l2":
            squares = {name: value.square() for name, value in values.items()}
            score = reduce_spans(squares, group, "sum", roles=self.roles).sqrt()
        else:
            score = reduce_spans(values, group, self.reduce, roles=self.roles)
        return score.masked_fill(absent.to(score.device), _KEPT)


def _without(group: Group, scales: dict[str, Tensor]) -> Tensor:
    """Which units of a group no scale belongs to."""
    ones = {s.tensor: torch.ones_like(scales[s.tensor]) for s in group.spans if s.role == "scale"}
    if not ones:
        return torch.ones(group.shape, dtype=torch.bool)
    return (reduce_spans(ones, group, "sum", roles=frozenset({"scale"})) == 0).cpu()
