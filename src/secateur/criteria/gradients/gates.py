"""Units scored by the gates on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from secateur.criteria.base import Context, register
from secateur.criteria.gradients.loss_gradient import LossCriterion
from secateur.criteria.gradients.taylor import Taylor
from secateur.errors import RecipeError
from secateur.model.call import default_loss
from secateur.model.gates import Gates, gated_spans, gates_of
from secateur.registry import one_of
from secateur.types import Group, Span


@register
@dataclass(frozen=True, kw_only=True)
class GateScore(LossCriterion):
    """Score a unit by the gate on it: its size |z|, or how much the loss reacts to it.

    The idea: a factor on the unit's output makes units of different layers, with and without norms,
    comparable. After training z with an L1 penalty its size says what is not needed; before, its gradient
    does. A bad choice: |z| of gates that were not trained (all are 1, a tie), or trained without a penalty.

    Formulas, with the gates as they are in the model, z = 1 where it has none (on what consumes the unit):
    "magnitude" |z|; "gradient" |z dL/dz|; "per-sample" mean_n (z dl_n/dz)^2, the Fisher information of log z. All
    are of the same kind in every layer and need no normalisation.

    Args:
        by: one of the three above.
        normalize: "none"; "mean" and "l2" divide by the group's mean and L2 norm.
        frozen: "score" (the gates may be trained while the weights are frozen) or "error".
        unused: "error" refuses gates that the loss never reaches, "zero" gives them the gradient 0.

    Raises:
        RecipeError: |z| of a group without gates, no weights to gate, an unknown word, or no data.
        InputError: unused parameters; the message names them.
        NonFiniteError: a factor, the loss or a gradient is NaN or Inf.

    Cost:
        None for |z|; else one forward and backward pass over the data, and a copy of the model where it has
        gates. For single weights "per-sample" forms the gradients of every sample: two to three such passes.

    Source:
        |z|: Liu et al. 2017, section 3; "per-sample": Molchanov et al. 2019, equation 8 with gates (section
        3.2), per sample instead of per batch.

    Example:
        >>> import torch
        >>> from secateur.model.gates import insert_gates
        >>> layer = torch.nn.Linear(2, 1)
        >>> heads = Group("in", "neuron", (2,), (Span("weight", torch.tensor([[0, 1]]), "in"),))
        >>> gates = insert_gates(layer, [heads])
        >>> _ = gates.values["in"].data.copy_(torch.tensor([0.5, -2.0]))
        >>> GateScore(by="magnitude").score(Context(layer, [heads]))["in"]
        tensor([0.5000, 2.0000])
    """

    name: ClassVar[str] = "gate"
    summary: ClassVar[str] = "size of a trainable gate on each unit, or the reaction of the loss to it"
    speed: ClassVar[str] = "medium: less than one epoch over the scoring data; single weights three"
    best_for: ClassVar[str] = "channels, heads and neurons of networks without batch norm"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})

    by: Literal["magnitude", "gradient", "per-sample"] = "per-sample"
    frozen: Literal["error", "score"] = "score"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        one_of("by", self.by, ("magnitude", "gradient", "per-sample"))

    def score(self, context: Context) -> dict[str, Tensor]:
        """As `Criterion.score`; groups go by the tensor names that the model had before the insertion."""
        gates = gates_of(context.model)
        if self.by == "magnitude":
            return {g.name: self._checked({g.name: self._size(gates, g)}, g) for g in context.groups}
        gated = bool(gates.values)
        if not gated:
            self._check(context)
        groups = [self._gated(gates, g) if gated else _only(g, gated_spans(g, "consumer")) for g in context.groups]
        model = context.model
        if gated:
            # z dL/dz is the sum of w dL/dw over the folded weights, which Taylor knows how to take.
            model = copy.deepcopy(context.model)
            gates_of(model).fold()
        context = replace(context, model=model, groups=groups, loss=context.loss or default_loss)
        self._check(context)
        slope = Taylor(
            reduce="signed" if self.by == "gradient" else "per-sample",
            coupled="all",
            normalize=self.normalize,
            frozen=self.frozen,
            unused=self.unused,
        )
        return slope.score(context)

    def _size(self, gates: Gates, group: Group) -> Tensor:
        return self.finish(self._z(gates, group).detach().abs())

    def _gated(self, gates: Gates, group: Group) -> Group:
        self._z(gates, group)
        return _only(group, gates.spans(group))

    def _z(self, gates: Gates, group: Group) -> Tensor:
        values = gates.values
        if group.name not in values:
            raise RecipeError(
                f"group {group.name!r} has no gates",
                hint="call insert_gates(model, groups) and train them, or score by='per-sample' without gates",
            )
        return values[group.name]


def _only(group: Group, spans: Sequence[Span]) -> Group:
    return replace(group, spans=tuple(spans))
