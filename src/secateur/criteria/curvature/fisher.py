"""Fisher information: mean squared per-sample gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, register
from secateur.criteria.curvature.diagonal import DiagonalCriterion, data_and_loss
from secateur.criteria.sums import reduce_spans
from secateur.errors import RecipeError
from secateur.model.share import over_processes
from secateur.registry import one_of
from secateur.statistics.curvature.fisher_information import each_sample, fisher_diagonal
from secateur.statistics.curvature.hessian import Diagonal
from secateur.statistics.gradients.functional import Tensors


@register
@dataclass(frozen=True, kw_only=True)
class Fisher(DiagonalCriterion):
    """Rise of the loss with the Fisher information in place of the Hessian: F w^2 / 2.

    The idea: the mean of squared per-sample gradients looks like a Hessian diagonal where the network's
    predictions match the labels in distribution, and costs one backward pass per sample. The squares are of
    single samples: squared batch gradients are something else, and rank differently. The empirical Fisher
    (labels "data") is a bad choice where the network fits its training data (all gradients vanish: a warning
    says so), and it is not the Hessian even for linear regression, where both can rank in opposite order.

    Groups: the sum over the weights of the unit; with `joint` the form w_u^T F_uu w_u / 2, that is half the
    mean over the samples of (sum over the unit of g w) squared, the Fisher information of a gate on the unit.

    Args:
        labels: "data" the empirical Fisher; "model" targets drawn from the network's predictions, whose mean
            is the Gauss-Newton diagonal (cross entropy and squared error only).
        draws: drawn targets per sample for "model".
        joint: score groups by the whole quadratic form.
        coupled: see `DiagonalCriterion`.

    Raises:
        RecipeError: unknown word, draws below 1.

    Warns:
        CurvatureWarning: the gradients are all zero, or the model is right on more than 99.9 % of the samples.

    Cost:
        One backward pass per sample (times draws), and one forward pass to judge the fit.

    Source:
        Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation", 2019, equations 3, 4;
        Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense networks and Fisher pruning",
        2018, equations 6 and 10 (elements, and gates for `joint`).

    Example:
        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = layer.weight.data.fill_(2.0)
        >>> groups = [Group("weight", "element", (1, 1), (Span("weight", None, "self"),))]
        >>> context = Context(layer, groups, data=[torch.tensor([[1.0], [3.0]])], loss=lambda m, x: m(x).mean())
        >>> Fisher().score(context)["weight"]  # mean of 1 and 9, times 4, half of it
        tensor([[10.]])
    """

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "rise of the loss from the mean squared per-sample gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels", "gradients"})
    speed: ClassVar[str] = "medium: about three epochs over the scoring data"
    best_for: ClassVar[str] = "networks that do not fit their data fully; a cheap second-order score"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True

    labels: Literal["data", "model"] = "data"
    draws: int = 1
    joint: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown words and numbers out of range."""
        super().__post_init__()
        one_of("labels", self.labels, ("data", "model"))
        if self.draws < 1:
            raise RecipeError(f"draws={self.draws} is too few", hint="give at least 1")

    def _diagonal(self, context: Context, names: list[str]) -> Diagonal:
        data, loss = data_and_loss(context, "the Fisher information")
        return fisher_diagonal(
            context.model,
            loss,
            data,
            names,
            labels=self.labels,
            draws=self.draws,
            seed=context.seed,
            progress=context.progress,
        )

    def _score(self, context: Context) -> dict[str, Tensor]:
        if not self.joint:
            return super()._score(context)
        data, loss = data_and_loss(context, "the Fisher information")
        weights = self.weights(context)
        total = {g.name: torch.zeros(g.shape, dtype=torch.float64) for g in context.groups}

        def forms(gradients: Tensors, weight: Tensor) -> None:
            for row in range(len(weight)):
                products = {n: g[row].to(torch.float64) * weights[n] for n, g in gradients.items()}
                for group in context.groups:
                    along = reduce_spans(products, group, "sum", roles=self.roles).cpu()
                    total[group.name] += float(weight[row]) * along.square()

        count = each_sample(
            context.model,
            loss,
            data,
            list(weights),
            forms,
            labels=self.labels,
            draws=self.draws,
            seed=context.seed,
            progress=context.progress,
        )
        total, count = over_processes(data, total, count)
        return {name: tensor / (2 * count) for name, tensor in total.items()}
