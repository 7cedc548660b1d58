"""Growing regularisation: units that are to go pay more and more, until they can."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.amounts import select
from secateur.criteria.base import Context
from secateur.errors import InputError
from secateur.planning.build import CriterionLike, GranularityLike, criterion_of, grouped
from secateur.registry import real_number, whole_number
from secateur.request import CRITERION
from secateur.training.penalties.base import Method, Penalty, register
from secateur.training.penalties.group_lasso import OWN
from secateur.training.unit_sums import per_element
from secateur.types import Example, Kept, Protect, StateDict


@register
class Growing(Penalty):
    """Half of lambda ||W_u||^2 over the units that will go, lambda growing from 0 by `strength` until `ceiling`.

    Which units go is decided at the beginning; the loss has time to move what they do elsewhere. `keep` is what
    ``secateur.plan(keep=...)`` takes afterwards.

    Args:
        model: as for every penalty.
        example: as for every penalty; needed for channels, heads and neurons.
        sparsity: share of the units of every group that will go.
        granularity: what a unit is, as for `secateur.plan`.
        criterion: says which go.
        every: optimizer steps between two increases.
        ceiling: largest lambda.
        strength: increase of lambda.
        method: as for every penalty.
        optimizer: as for every penalty; without one, call `grow` after every step.
        protect: as for every penalty.

    Source:
        Wang, Qin, Zhang, Fu, "Neural Pruning via Growing Regularization", 2021 (GReg-1: 1e-4 every 10 steps up to 1).
    """

    name = "growing"
    summary = "units that are to go pay more and more"
    follows_cuts = False

    def __init__(
        self,
        model: nn.Module,
        example: Example = None,
        *,
        sparsity: float,
        strength: float = 1e-4,
        granularity: GranularityLike | None = None,
        criterion: CriterionLike = CRITERION,
        every: int = 10,
        ceiling: float = 1.0,
        method: Method = "subgradient",
        optimizer: Optimizer | None = None,
        protect: Protect = (),
    ) -> None:
        self._wanted = sparsity, granularity, criterion
        self.every, self.ceiling, self.steps = whole_number("every", every, least=1), real_number("ceiling", ceiling), 0
        self.keep = Kept({})
        super().__init__(model, example, strength=strength, method=method, optimizer=optimizer, protect=protect)

    def _paying(self) -> dict[str, nn.Parameter]:
        sparsity, granularity, criterion = self._wanted
        rows = {"name": "vector", "axis": "row"}
        units = granularity or ("channel" if self.example is not None else rows)
        groups, trace = grouped(self.model, self.example, units, self.protect)
        scores = criterion_of(criterion).score(Context(self.model, groups, example=self.example, capture=trace))
        self.keep = select(scores, sparsity=sparsity, scope="local", min_keep=1, groups=groups)
        known = dict(self.model.named_parameters())
        self.going: dict[str, Tensor] = {}
        for group in groups:
            goes = (~self.keep[group.name]).float()
            for span in group.spans:
                if span.role in OWN and span.tensor in known:
                    # 0 for elements that no unit owns: `per_element` gives 1 there.
                    owned = torch.ones(()) if span.index is None else (span.index >= 0).float()
                    shape = known[span.tensor].shape
                    mine = per_element(goes.to(known[span.tensor].device), span, shape) * owned.to(
                        known[span.tensor].device
                    )
                    before = self.going.get(span.tensor)
                    self.going[span.tensor] = mine if before is None else torch.maximum(before, mine)
        return {name: known[name] for name in self.going}

    @property
    def rate(self) -> float:
        """Lambda now."""
        return min(self.strength * (self.steps // self.every), self.ceiling)

    def grow(self) -> None:
        """Count one optimizer step."""
        self.steps += 1

    def __call__(self) -> Tensor:
        """What to add to the loss."""
        self._follow()
        return self.rate * self.cost()

    def cost(self) -> Tensor:
        """Half the sum of w^2 over the units that will go."""
        return torch.stack([(self.going[n] * p.square()).sum() for n, p in self.paying.items()]).sum() / 2

    def shrink(self, rates: Mapping[str, float]) -> None:
        """Divided by 1 + learning rate times lambda."""
        for name, rate in rates.items():
            grown = rate / self.strength * self.rate if self.strength else 0.0
            self.paying[name].div_(1 + grown * self.going[name])

    def _after(self, optimizer: Optimizer, *rest: object) -> None:
        super()._after(optimizer, *rest)
        self.grow()

    def state_dict(self) -> StateDict:
        """How far lambda has grown, and which units go."""
        return {"steps": self.steps, "keep": dict(self.keep)}

    def load_state_dict(self, state: StateDict) -> None:
        """Go on from a checkpoint of a penalty that chose the same units.

        Raises:
            InputError: other units.
        """
        keep = state.get("keep", {})
        if keep.keys() != self.keep.keys():
            raise InputError("this is no state of this penalty", hint="give what state_dict() returned")
        if any(not torch.equal(keep[name].cpu(), mask.cpu()) for name, mask in self.keep.items()):
            raise InputError(
                "the checkpoint lets other units go",
                hint="make the penalty on the model as it was at the beginning, then load the checkpoint",
            )
        self.steps = int(state["steps"])
