"""Head importance: how much the loss reacts to a mask variable on each attention head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, register
from secateur.criteria.gradients.loss_gradient import LossCriterion, unit_values
from secateur.criteria.gradients.unit_gradients import mean_over_samples
from secateur.errors import RecipeError
from secateur.registry import one_of
from secateur.types import Group


@register
@dataclass(frozen=True, kw_only=True)
class HeadImportance(LossCriterion):
    """Score an attention head by the expected |dL/dxi|, xi a variable that multiplies the head's output.

    The idea: removing the head sets xi from 1 to 0, so the slope at 1 predicts the change of the loss. The
    absolute value is taken per sample, so that reactions of different sign do not cancel. It works as well for
    neurons and channels: for everything whose output is consumed by weights. A bad choice for removing most
    heads at once: the slope knows nothing of heads that can stand in for each other; prune in steps and
    score again.

    Formula: I_h = mean_n |sum of g_{n,ij} w_ij over the columns of the output projection that read head h|,
    which is |dl_n/dxi_h| by the chain rule. Under grouped queries the unit holds all query heads of a key.

    Args:
        reduce: "per-sample" as above; "per-batch" takes the absolute value once per batch (what most code
            does: it depends on the batch size); "signed" once for the mean over all data.
        normalize: "l2" divides by the L2 norm of the layer's scores, as published; "mean" by their mean;
            "none" compares predicted changes of the loss across layers.
        frozen: "error" refuses parameters with requires_grad=False, "score" scores them all the same.
        unused: "error" refuses parameters that the loss never reaches, "zero" gives them the gradient 0.

    Raises:
        RecipeError: a group whose output no weight consumes, an unknown word, or no data.
        InputError: frozen or unused parameters; the message names them.
        NonFiniteError: the loss or a gradient is NaN or Inf.

    Cost:
        One forward pass over the data and a backward pass without weight gradients.

    Source:
        Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", 2019, equation 2.

    Example:
        Two heads of one feature each, read with weights 2 and 3; samples (1, -1) and (-1, -1).

        >>> from secateur.types import Group, Span
        >>> out = torch.nn.Linear(2, 1, bias=False)
        >>> _ = out.weight.data.copy_(torch.tensor([[2.0, 3.0]]))
        >>> heads = Group("heads", "head", (2,), (Span("weight", torch.tensor([[0, 1]]), "in"),))
        >>> data = [torch.tensor([[1.0, -1.0], [-1.0, -1.0]])]
        >>> criterion = HeadImportance(normalize="none")
        >>> criterion.score(Context(out, [heads], data=data, loss=lambda m, x: m(x).mean()))["heads"]
        tensor([2., 3.])
    """

    name: ClassVar[str] = "head-importance"
    summary: ClassVar[str] = "reaction of the loss to a mask variable on each head: mean |dL/dxi|"
    speed: ClassVar[str] = "medium: less than one epoch over the scoring data"
    best_for: ClassVar[str] = "attention heads"
    comparable: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "zero_lowest"})
    granularities: ClassVar[tuple[str, ...]] = ("head", "head_dim", "neuron", "channel")

    reduce: Literal["per-sample", "per-batch", "signed"] = "per-sample"
    normalize: Literal["none", "mean", "l2"] = "l2"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        one_of("reduce", self.reduce, ("per-sample", "per-batch", "signed"))

    @property
    def roles(self) -> frozenset[str] | None:
        """The weights that read the head's output."""
        return frozenset({"in"})

    def _score(self, context: Context) -> dict[str, Tensor]:
        unread = [g.name for g in context.groups if all(span.role != "in" for span in g.spans)]
        if unread:
            raise RecipeError(
                f"no weight reads the output of {unread[0]!r}",
                why=f"{self.name!r} is the derivative with respect to a mask on what is read",
                hint="protect the group, or use criterion 'taylor'",
            )
        parameters = self.trainable(context)
        if self.reduce == "per-sample":
            values = mean_over_samples(context, self.roles, list(parameters), torch.abs, unused=self.unused)
        else:
            values = self._from_gradients(context)
        return {g.name: self.finish(values[g.name]).view(g.shape) for g in context.groups}

    def _from_gradients(self, context: Context) -> dict[str, Tensor]:
        def of_batch(product: Mapping[str, Tensor], group: Group) -> Tensor:
            unit = unit_values(product, group, self.roles)
            return unit.abs() if self.reduce == "per-batch" else unit

        means = self.mean_over_batches(context, self.trainable(context), of_batch)
        return {name: value.abs() for name, value in means.items()}
