"""Structured units shrink while the model trains: every update is a plan, proved and applied in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import floor

from torch import nn
from torch.optim import Optimizer

from secateur.amounts import round_half_up
from secateur.errors import InputError, RecipeError
from secateur.kinds.base import Candidates, Left
from secateur.kinds.find import find
from secateur.model.written import weights_kept
from secateur.planning.averages import Averages, require_averages
from secateur.planning.compose import composed_certificate
from secateur.planning.decide import decide
from secateur.planning.decision import fingerprint
from secateur.planning.plan import Plan
from secateur.planning.written import plan_of
from secateur.request import Amount, Target
from secateur.training.removal import PruningJob, Remover
from secateur.types import Example


class Cutting(Remover):
    """Channels, heads, neurons, experts, layers: removed for real; the optimizer's state and averages follow.

    Args:
        job: what it works with.
        candidates: what may go from the model as it is at the beginning.
    """

    physical = True

    def __init__(self, job: PruningJob, candidates: Candidates) -> None:
        super().__init__(job)
        if len(job.optimizers) > 1:
            raise RecipeError(
                "one optimizer's state follows a cut, and several were given.",
                hint="Give one optimizer with a parameter group for each of them.",
            )
        require_averages(job.model, job.ema)
        scope = candidates.scope or job.request.scope
        # Of the model as it came: a tenth of what is left, again and again, would be nothing in the end.
        self.floors = {group.name: candidates.least(group, scope) for group in candidates.groups}
        self.total = sum(group.size for group in candidates.groups)
        whole = Left({group.name: group.size for group in candidates.groups}, dict)
        self.prices = {what: candidates.price(what, whole) for what in ("params", "macs", "memory_bytes")}
        self.gone = 0
        self.made: Plan | None = None

    def whole(self, what: str) -> int:
        """Units or bytes of the model as it came."""
        return self.total if what == "count" else self.prices[what]

    def removed(self) -> tuple[int, int]:
        """Units that were cut, and all."""
        return self.gone, self.total

    def prune(self, target: Target, *, last: bool) -> None:
        """Find what is left, score, decide, prove and cut."""
        if any(isinstance(value, Mapping) for value in target.given().values()):
            raise RecipeError("amounts per name pattern belong to masks here.", hint="Give one number.")
        if not self._open(target):
            return
        job = self.job
        with weights_kept(job.model):
            candidates = find(job.model, job.example, job.request)
        candidates.floors = self.floors
        bounds = self._left(target, candidates)
        if not bounds:
            return
        request = replace(job.request, target=Target(**bounds))  # type: ignore[arg-type]
        scores = job.scores(candidates)
        keep = job.together.same(decide(candidates, scores, request, comparable=job.rule.comparable))
        plan = plan_of(candidates, request, scores, keep, dtype=job.dtype, tolerance=job.tolerance)
        if plan.removes:
            self._apply(plan)

    def _apply(self, plan: Plan) -> None:
        job = self.job
        # Composed first, from the model as it still is.
        made = plan if self.made is None else self.made.followed(plan, job.model)
        plan.apply(job.model, inplace=True, optimizer=next(iter(job.optimizers), None), ema=job.ema)
        if self.made is not None:
            made.certificate = composed_certificate([self.made.certificate, plan.certificate])
        self.made = made
        self.gone += plan.units["removed"]

    def _open(self, target: Target) -> bool:
        """Whether a target may ask for more than is gone; asked before the engine runs."""
        bounds = target.numbers()
        return bool(set(bounds) - {"sparsity", "count"}) or any(
            self._wanted(what, value) > self.gone for what, value in bounds.items()
        )

    def _wanted(self, what: str, value: float) -> int:
        return int(value) if what == "count" else round_half_up(value, self.total)

    def _left(self, target: Target, candidates: Candidates) -> dict[str, Amount]:
        """The target in terms of the model as it is now; empty where it holds already."""
        bounds: dict[str, Amount] = {}
        now = Left({group.name: group.size for group in candidates.groups}, dict)
        for what, value in target.numbers().items():
            if what in ("sparsity", "count"):
                more = self._wanted(what, value) - self.gone
                if more > 0:
                    bounds["count"] = more
                continue
            most = int(value) if what == "memory_bytes" else floor(value * self.prices[what])
            price = candidates.price(what, now)
            if price > most:
                # Half a unit more, so that rounding down gives this very number again.
                bounds[what] = most if what == "memory_bytes" else (most + 0.5) / price
        return bounds

    def enforce(self) -> None:
        """Nothing grows back."""

    def enforce_unheld(self) -> None:
        """Nothing grows back."""

    def plan(self) -> Plan | None:
        """All cuts as one plan for the model as it came."""
        return self.made

    def state_dict(self) -> dict[str, object]:
        """The plan, as its file holds it, and what amounts are counted from."""
        return {
            "plan": "" if self.made is None else self.made.to_json(),
            "after": fingerprint(self.job.model),
            "gone": self.gone,
            "total": self.total,
            "floors": dict(self.floors),
            "prices": dict(self.prices),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Cut the model as it came to where the checkpoint was, and prove the cut anew; a model that is there stays."""
        if self.gone:
            raise InputError("this model was cut already", hint="pass state= to the pruner of a model as it came")
        try:
            self.made = cut_again(
                self.job.model, state, optimizers=self.job.optimizers, ema=self.job.ema, example=self.job.example
            )
            self.gone, self.total = int(state["gone"]), int(state["total"])  # type: ignore[call-overload]
            self.floors = dict(state["floors"])  # type: ignore[call-overload]
            self.prices = dict(state["prices"])  # type: ignore[call-overload]
        except (KeyError, TypeError) as error:
            raise InputError("this is no state of cuts", hint="give what pruner.state_dict() returned") from error


def cut_again(
    model: nn.Module,
    state: Mapping[str, object],
    *,
    optimizers: Sequence[Optimizer] = (),
    ema: Averages | None = None,
    example: Example = None,
) -> Plan | None:
    """Bring a model to the shapes that a checkpoint of cuts has.

    Args:
        model: as it came, cut in place; or of these shapes already.
        state: `Cutting.state_dict`.
        optimizers: whose state follows.
        ema: averages, which follow.
        example: to prove the cut with; without one it is checked against the model's names, shapes and integers.

    Returns:
        the plan; None where nothing was cut yet.
    """
    text = state["plan"]
    if not isinstance(text, str):
        raise TypeError("a plan is a text")
    if not text:
        return None
    plan = Plan.from_data(json.loads(text), "the pruner's state")
    if fingerprint(model) != state["after"]:
        plan.apply(model, inplace=True, optimizer=next(iter(optimizers), None), ema=ema, example=example)
    return plan
