"""What criteria from the diagonal of a curvature matrix share: half h w squared, summed over the unit."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion
from secateur.model import call
from secateur.registry import one_of
from secateur.statistics.curvature.hessian import Diagonal
from secateur.statistics.gradients.per_sample import batch_gradients
from secateur.types import Data, Loss


@dataclass(frozen=True, kw_only=True)
class DiagonalCriterion(Criterion):
    """Score = sum over the unit of h_ii w_i^2 / 2, the predicted rise of the loss.

    Args:
        coupled: "all" counts every weight that goes with the unit, "out" only those that produce it. Units
            of granularity element, vector, kernel and block have no other weights.
    """

    coupled: Literal["all", "out"] = "all"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        one_of("coupled", self.coupled, ("all", "out"))

    @property
    def roles(self) -> frozenset[str] | None:
        """The producing weights, or all."""
        return frozenset({"out", "self"}) if self.coupled == "out" else None

    @abstractmethod
    def _diagonal(self, context: Context, names: list[str]) -> Diagonal:
        """The curvature diagonal; the model is in eval mode."""

    def diagonal(self, context: Context) -> Diagonal:
        """The curvature that the scores are made of, with its method and error bars.

        Args:
            context: as for `score`; the model is put in eval mode and given back as it was.

        Returns:
            Values, methods and standard errors per parameter.
        """
        context = self._admitted(context)
        with torch.inference_mode(False), self._guard(context):
            return self._diagonal(context, list(self.weights(context)))

    def contributions(self, context: Context) -> dict[str, Tensor]:
        """Half h w squared, in float64."""
        weights = self.weights(context)
        values = self._diagonal(context, list(weights)).values
        return {n: values[n] * w.to(torch.float64).square() / 2 for n, w in weights.items()}


def data_and_loss(context: Context, why: str) -> tuple[Data, Loss]:
    """Data and loss of a context that `Criterion.score` has checked, the default loss where there is none.

    Raises:
        InputError: the data is a one-shot iterator.
    """
    if context.data is None:
        raise TypeError("the criterion does not declare that it needs data")
    call.require_reiterable(context.data, why)
    return context.data, context.loss or call.default_loss


def mean_gradient(context: Context, names: list[str]) -> dict[str, Tensor]:
    """Gradient of the mean loss over the data, float64; batches are weighted by their samples."""
    data, loss = data_and_loss(context, "the gradient")
    total: dict[str, Tensor] = {}
    count = 0
    for found in batch_gradients(context.model, loss, data, names):
        for name, gradient in found.gradients.items():
            part = gradient.to(torch.float64) * found.samples
            total[name] = total[name] + part if name in total else part
        count += found.samples
    return {name: tensor / count for name, tensor in total.items()}
