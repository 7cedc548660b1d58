"""Group lasso: makes all weights of a unit zero together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.planning.build import GranularityLike, grouped
from secateur.registry import one_of
from secateur.training.penalties.base import Method, Penalty, register
from secateur.training.unit_sums import per_element, unit_sizes, unit_sums
from secateur.types import Example, Group, Protect

OWN = frozenset({"out", "self"})
ALL = frozenset({"out", "self", "in", "scale", "bias"})


@register
class GroupLasso(Penalty):
    """Sum over units of sqrt(size) times the L2 norm of their weights.

    Args:
        model: as for every penalty.
        example: as for every penalty; needed for channels, heads and neurons.
        granularity: what a unit is, as for `secateur.plan`; by default channel, without an example rows.
        coupled: "out" counts the weights that produce a unit, "all" those that go with it as well; a weight may then
            belong to two units, whose proximal steps follow each other.
        strength: as for every penalty.
        method: as for every penalty.
        optimizer: as for every penalty.
        protect: as for every penalty.

    Source:
        Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.
    """

    name = "group_lasso"
    summary = "norms of units: all weights of a unit become zero together"

    def __init__(
        self,
        model: nn.Module,
        example: Example = None,
        *,
        strength: float,
        granularity: GranularityLike | None = None,
        coupled: Literal["out", "all"] = "out",
        method: Method = "subgradient",
        optimizer: Optimizer | None = None,
        protect: Protect = (),
    ) -> None:
        one_of("coupled", coupled, ("out", "all"))
        self.granularity, self.roles = granularity, OWN if coupled == "out" else ALL
        super().__init__(model, example, strength=strength, method=method, optimizer=optimizer, protect=protect)

    def _paying(self) -> dict[str, nn.Parameter]:
        rows = {"name": "vector", "axis": "row"}
        units = self.granularity or ("channel" if self.example is not None else rows)
        groups, _ = grouped(self.model, self.example, units, self.protect)
        known = dict(self.model.named_parameters())
        tensors = [s.tensor for g in groups for s in g.spans if s.role in self.roles and s.tensor in known]
        paying = {name: known[name] for name in dict.fromkeys(tensors)}
        shapes = {name: parameter.shape for name, parameter in paying.items()}
        self.groups: list[Group] = [
            g for g in groups if any(s.tensor in paying and s.role in self.roles for s in g.spans)
        ]
        self.roots = {group.name: unit_sizes(group, shapes, self.roles).sqrt() for group in self.groups}
        return paying

    def norms(self, group: Group) -> Tensor:
        """L2 norm of every unit."""
        return unit_sums({n: p.float().square() for n, p in self.paying.items()}, group, self.roles).clamp(min=0).sqrt()

    def cost(self) -> Tensor:
        """Sum of sqrt(size) times norm."""
        total = torch.zeros(())
        for group in self.groups:
            squares = unit_sums({n: p.float().square() for n, p in self.paying.items()}, group, self.roles)
            # The root has no gradient at 0, where the sub-gradient 0 is taken.
            norms = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)
            total = total.to(norms.device) + (self.roots[group.name].to(norms.device) * norms).sum()
        return total

    def shrink(self, rates: Mapping[str, float]) -> None:
        """Every unit by its own factor, max(1 - rate sqrt(size) / norm, 0)."""
        for group in self.groups:
            norms = self.norms(group)
            root = self.roots[group.name].to(norms.device)
            for span in group.spans:
                if span.role not in self.roles or span.tensor not in rates:
                    continue
                factor = (1 - rates[span.tensor] * root / norms.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0)
                parameter = self.paying[span.tensor]
                each = per_element(factor, span, parameter.shape)
                parameter.mul_(each.to(parameter.dtype)).masked_fill_(each == 0, 0.0)
