"""Trainable gates with L1: slimming for networks without batch norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.model.gates import Gates, insert_gates
from secateur.planning.build import GranularityLike, grouped
from secateur.registry import real_number
from secateur.training.penalties.base import Method, Penalty, register, soft_threshold
from secateur.types import Example, Protect, Scores


@register
class GatePenalty(Penalty):
    """Sum of |z| over factors z = 1 that are put on every unit; they are trained, then folded into the weights.

    ``finish()`` folds and hands back |z| as scores, which ``secateur.plan(scores=...)`` takes: a unit of z = 0 is not
    read by anybody any more, so that its removal changes nothing.

    Args:
        model: gates are inserted into it until `finish`.
        example: what one forward takes.
        granularity: what a unit is: channel, neuron, head.
        strength: as for every penalty.
        method: as for every penalty.
        optimizer: gets the gates as a parameter group of their own, without weight decay.
        protect: as for every penalty.
        lr: learning rate of the gates; None takes that of the optimizer's first group.

    Source:
        Liu et al., "Network Slimming", 2017, section 3 (scaling layers of their own as the alternative to batch norms).
    """

    name = "gates"
    summary = "sum of |z| of inserted factors: slimming without norms"
    follows_cuts = False

    def __init__(
        self,
        model: nn.Module,
        example: Example = None,
        *,
        strength: float,
        granularity: GranularityLike = "channel",
        method: Method = "subgradient",
        optimizer: Optimizer | None = None,
        protect: Protect = (),
        lr: float | None = None,
    ) -> None:
        self.granularity = granularity
        if lr is not None:
            real_number("lr", lr)
        super().__init__(model, example, strength=strength, method=method, protect=protect)
        if optimizer is not None:
            group = {"params": list(self.paying.values()), "weight_decay": 0.0}
            optimizer.add_param_group(group if lr is None else {**group, "lr": lr})
            self.hold(optimizer)

    def _paying(self) -> dict[str, nn.Parameter]:
        self.groups, _ = grouped(self.model, self.example, self.granularity, self.protect)
        self.gates: Gates = insert_gates(self.model, self.groups)
        return dict(self.gates.values)

    def cost(self) -> Tensor:
        """Sum of |z|."""
        return torch.stack([z.abs().sum() for z in self.paying.values()]).sum()

    def shrink(self, rates: Mapping[str, float]) -> None:
        """Towards 0 by a constant amount."""
        for name, rate in rates.items():
            soft_threshold(self.paying[name], rate)

    def scores(self) -> Scores:
        """|z| of every unit, higher = keep."""
        return Scores({name: z.detach().abs().float() for name, z in self.paying.items()}, self.groups)

    def finish(self) -> Scores:
        """Fold the gates into the weights, and let the optimizer go.

        Returns:
            scores for ``secateur.plan(scores=...)``.
        """
        scores = self.scores()
        self.remove()
        self.gates.fold()
        return scores
