"""Gauss-Newton: the curvature of the loss pulled back through the slope of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.criteria.base import Context, register
from secateur.criteria.curvature.diagonal import DiagonalCriterion, data_and_loss
from secateur.criteria.forecast import EpochForecast, outputs
from secateur.errors import RecipeError
from secateur.statistics.curvature.gauss_newton_matrix import gauss_newton_diagonal
from secateur.statistics.curvature.hessian import Diagonal

FEWER = "take draws=1, or criterion fisher"


@register
@dataclass(frozen=True, kw_only=True)
class GaussNewton(DiagonalCriterion):
    """Rise of the loss from the diagonal of the Gauss-Newton matrix: G w^2 / 2, never negative.

    The idea: the Hessian is J^T H_out J plus residuals times second derivatives of the network; the first part
    alone is positive for a convex loss, needs no second derivatives of the network, and where activations are
    piecewise linear it is the whole of every layer's own block: there it equals criterion "obd". Unlike the
    empirical Fisher it does not fade where the network fits its data. A bad choice with GELU, SiLU or
    attention far from a fit (it drops what "obd" keeps), and with thousands of outputs per sample.

    Groups: the sum over the weights of the unit. Scores are changes of one loss and compare across layers.

    Args:
        draws: None is exact, one backward pass per output and sample; a number uses that many random-sign
            sums of the outputs' curvature roots instead (unbiased).
        coupled: see `DiagonalCriterion`.

    Raises:
        RecipeError: draws below 1.

    Cost:
        Outputs x samples backward passes, or draws x samples.

    Source:
        Schraudolph 2002; Botev, Ritter, Barber, "Practical Gauss-Newton Optimisation for Deep Learning", 2017.

    Example:
        >>> import torch
        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean() / 2
        >>> groups = [Group("weight", "element", (1, 2), (Span("weight", None, "self"),))]
        >>> data = [(torch.tensor([[1.0, 2.0], [1.0, 4.0]]), torch.zeros(2, 1))]
        >>> GaussNewton().score(Context(layer, groups, data=data, loss=loss))["weight"]
        tensor([[4.5000, 5.0000]])
    """

    name: ClassVar[str] = "gauss-newton"
    summary: ClassVar[str] = "rise of the loss from the Gauss-Newton diagonal, which is never negative"
    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels", "gradients"})
    speed: ClassVar[str] = "slow: about 1.4 epochs per output (ten classes: 14); draws=1: three"
    best_for: ClassVar[str] = "ReLU networks with few outputs, where it is the true Hessian diagonal"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})

    draws: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        if self.draws is not None and self.draws < 1:
            raise RecipeError(f"draws={self.draws} is too few", hint="give at least 1, or None for exact")

    def forecast(self, context: Context) -> EpochForecast | None:
        """Epochs by the number of outputs, or of draws."""
        data_and_loss(context, "Gauss-Newton")
        if self.draws is not None:
            return EpochForecast(
                1.6 + 1.4 * self.draws, f"one backward pass per sample and each of {self.draws} draws", FEWER
            )
        count = outputs(context)
        why = f"one backward pass per sample and each of {count} outputs"
        return None if count is None else EpochForecast(1.4 * count, why, FEWER)

    def _diagonal(self, context: Context, names: list[str]) -> Diagonal:
        data, loss = data_and_loss(context, "Gauss-Newton")
        return gauss_newton_diagonal(
            context.model,
            loss,
            data,
            names,
            draws=self.draws,
            seed=context.seed,
            progress=context.progress,
        )
