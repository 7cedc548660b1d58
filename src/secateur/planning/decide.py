"""From scores to a decision: which units stay. The only place where anything is chosen.

Whatever is removed for real is one ordered list of removals; every target (counts, parameters, multiply-accumulates,
bytes, measured latency) is the shortest prefix that meets it, so a smaller budget removes a superset. Masks, of which
there are millions, are selected without a list (`amounts.select`), to the same counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor

from secateur.amounts.allocate.base import round_half_up
from secateur.amounts.allocate.sensitivity import NAME, Curves, no_curves
from secateur.amounts.order import RemovalOrder, removal_order, removals_for
from secateur.amounts.patterns import per_pattern
from secateur.amounts.select import select
from secateur.errors import RecipeError, TargetError
from secateur.kinds.base import Candidates, Family, Keep, Left
from secateur.kinds.weights.kind import Weights
from secateur.kinds.weights.nm import NM
from secateur.planning.timed import Stopwatch, removals_for_latency
from secateur.request import AMOUNTS, Amount, Request, Target
from secateur.types import Group


def decide(
    candidates: Candidates,
    scores: Mapping[str, Tensor],
    request: Request,
    *,
    comparable: bool,
    curves: Curves | None = None,
) -> Keep:
    """Choose what stays.

    Args:
        candidates: what may go.
        scores: group name -> scores, higher = keep.
        request: how much, from where.
        comparable: whether scores of different groups share one scale, for example a change of the loss.
        curves: of allocation "sensitivity": what each group loses.

    Returns:
        group name -> bool tensor of the group's shape, True = keep.

    Raises:
        TargetError: the target cannot be reached; names the reachable range.
        RecipeError: a target, scope or allocation that does not apply to the kind.

    Cost: one sort of the units and log2(units) evaluations of a cost; a latency target measures real models.
    """
    if curves is not None:
        _require_global(candidates, request)
    if isinstance(candidates, Weights):
        return _masks(candidates, scores, request, curves)
    if request.scope == "row":
        raise RecipeError("scope 'row' belongs to masks.", hint="Use scope global or local for cuts.")
    if curves is None and request.allocation not in ("global", "uniform"):
        if request.allocation == NAME:
            raise no_curves()
        raise RecipeError(
            f"allocation {request.allocation!r} belongs to masks.", hint="Use global or uniform for cuts."
        )
    return _Search(candidates, scores, request, comparable=comparable, curves=curves).choose()


def _require_global(candidates: Candidates, request: Request) -> None:
    """Curves say what a unit costs beside those of other groups: one ranking of all is what they are for."""
    pattern = isinstance(candidates, Weights) and isinstance(candidates.unit, NM)
    if (candidates.scope or request.scope) != "global" or pattern:
        raise RecipeError(
            "allocation 'sensitivity' ranks all units together.",
            why=f"{request.what} with scope {candidates.scope or request.scope} gives every group its own share",
            hint="Use scope global, or leave allocation out.",
        )


# -- masks -----------------------------------------------------------------------------------------------------


def _masks(candidates: Weights, scores: Mapping[str, Tensor], request: Request, curves: Curves | None) -> Keep:
    target = _target(request)
    ranked = () if curves is None else (NAME,)
    scores = scores if curves is None else curves.worth(scores)
    for what in target.given():
        if what not in AMOUNTS:
            candidates.price(what, Left({}, dict))
    pattern = candidates.unit if isinstance(candidates.unit, NM) else None
    if pattern is not None:
        pattern.require(target.given())
        return select(scores, scope=request.scope, granularity=pattern, groups=candidates.groups)
    tensors = dict(candidates.model.named_parameters())
    return select(
        scores,
        **_whole_counts(target),  # type: ignore[arg-type]
        scope=request.scope,
        granularity=candidates.unit,
        groups=candidates.groups,
        allocation=None if request.allocation in ("global", *ranked) else request.allocation,
        min_keep=request.min_keep,
        shapes={g.name: tuple(tensors[g.spans[0].tensor].shape) for g in candidates.groups},
    )


# -- removals --------------------------------------------------------------------------------------------------


def relative_scores(score: Tensor) -> Tensor:
    """Scores in units of their group's mean size: weights before a normalisation have no scale of their own."""
    # Of the sizes, not of the scores: signed scores can have a mean near zero, and dividing by it would blow them up.
    scale = score.abs().double().mean()
    return (score.double() / scale if float(scale) > 0 else score.double()).float()


class _Search:
    """The shortest list of removals that meets every target.

    What is listed are units of groups, or where groups must keep equally many, chunks of a family: one chunk takes the
    worst units of every member.
    """

    def __init__(
        self,
        candidates: Candidates,
        scores: Mapping[str, Tensor],
        request: Request,
        *,
        comparable: bool,
        curves: Curves | None = None,
    ) -> None:
        self.candidates, self.scores, self.request = candidates, scores, request
        self.target = _target(request)
        self.scope = candidates.scope or ("local" if request.allocation == "uniform" else request.scope)
        self.groups = {group.name: group for group in candidates.groups}
        self.families = {family.name: family for family in candidates.families}
        self.ranked = self._ranked(comparable=comparable) if curves is None else self._by_curves(curves)

    def choose(self) -> Keep:
        """Kept units per group."""
        apart = self.target.per_pattern()
        if apart is not None:
            return self._apart(*apart)
        order = self._order(list(self.families or self.groups))
        steps = [self._removals(order, what, limit) for what, limit in self.target.numbers().items()]
        return self._keep(order, max([0, *steps]))

    def _apart(self, what: str, amounts: Mapping[str, float]) -> Keep:
        """Every set of names meets its own amount; nothing else is asked of them together."""
        if self.families or len(self.target.given()) > 1:
            raise RecipeError(
                f"target: {what} per name pattern stands alone.",
                why="equal widths or a second bound would decide for the sets together",
                hint="Leave out expressible and further targets, or give one number.",
            )
        keep: dict[str, Tensor] = {}
        for names, amount in per_pattern(list(self.groups), amounts):
            order = self._order(names)
            keep.update(self._keep(order, self._removals(order, what, amount)))
        return keep

    # -- the list ---------------------------------------------------------------------------------------------

    def _ranked(self, *, comparable: bool) -> dict[str, Tensor]:
        """Scores by which units of different groups may be compared."""
        if self.scope != "global":
            return dict(self.scores)
        if not comparable:
            return {name: relative_scores(score) for name, score in self.scores.items()}
        if len(self.request.granularity) == 1:
            return dict(self.scores)
        # Units of several granularities cost differently: what counts is the loss per multiply-accumulate (or weight).
        price = self._unit_prices()
        return {name: score.double() / price[name] for name, score in self.scores.items()}

    def _by_curves(self, curves: Curves) -> dict[str, Tensor]:
        """What a unit costs in quality, per unit of what the target counts."""
        worth = curves.worth(self.scores)
        if set(self.target.given()) <= {"sparsity", "count"}:
            return worth  # units count alike
        price = self._unit_prices()
        return {name: score.double() / price[name] for name, score in worth.items()}

    def _unit_prices(self) -> dict[str, float]:
        """What one unit of every group costs, in the currency of the target."""
        what = next((w for w in ("macs", "params", "memory_bytes") if w in self.target.given()), "params")
        whole = {name: group.size for name, group in self.groups.items()}
        total = self.candidates.price(what, Left(whole, dict))
        return {
            name: max(total - self.candidates.price(what, Left({**whole, name: size - 1}, dict)), 1)
            for name, size in whole.items()
        }

    def _order(self, names: Sequence[str]) -> RemovalOrder:
        worth, floors, grids = {}, {}, {}
        for name in names:
            family = self.families.get(name)
            if family is None:
                group = self.groups[name]
                worth[name] = self._worth(group)
                floors[name] = self.candidates.least(group, self.scope)
                grids[name] = self.candidates.grid(group)
            else:
                worth[name] = _chunks(family, self.ranked)
                least = [self.candidates.least(self.groups[member], self.scope) for member in family.groups]
                floors[name] = min(ceil(max(family.least, *least) / family.step), family.chunks)
                # The step of a family is its grid already; only where it goes one by one the request's grid is left.
                alone = self.candidates.grid(self.groups[family.groups[0]])
                grids[name] = alone if family.step == 1 else 1
        return removal_order(worth, scope=self.scope, min_keep=floors, round_to=grids)

    def _worth(self, group: Group) -> Tensor:
        worth, stays = self.ranked[group.name].double().cpu(), self.candidates.stays(group)
        return worth if stays is None else worth.masked_fill(stays, torch.inf)

    def _left(self, order: RemovalOrder, step: int) -> Left:
        counts: dict[str, int] = {}
        for name, n in order.kept_counts(step).items():
            family = self.families.get(name)
            if family is None:
                counts[name] = n
            else:
                counts.update(dict.fromkeys(family.groups, family.units(n)))
        return Left(counts, partial(self._keep, order, step))

    def _keep(self, order: RemovalOrder, step: int) -> dict[str, Tensor]:
        keep: dict[str, Tensor] = {}
        for name, mask in order.keep(step).items():
            family = self.families.get(name)
            if family is None:
                keep[name] = mask
                continue
            gone = family.size - family.units(int(mask.sum()))
            for member in family.groups:
                keep[member] = torch.ones(family.size, dtype=torch.bool)
                keep[member][self.ranked[member].double().cpu().argsort(stable=True)[:gone]] = False
        return keep

    # -- how far down the list --------------------------------------------------------------------------------

    def _removals(self, order: RemovalOrder, what: str, limit: float) -> int:
        if what == "threshold":
            return self._below(order, limit)
        if what in ("sparsity", "count"):
            return self._exactly(order, what, limit)
        if what == "latency_ms":
            return self._for_latency(order, limit)
        price = self.candidates.price
        whole = price(what, self._left(order, 0))
        bound = limit if what == "memory_bytes" else floor(limit * whole)
        return removals_for(order, lambda step: price(what, self._left(order, step)), bound, what)

    def _exactly(self, order: RemovalOrder, what: str, limit: float) -> int:

        def left(step: int) -> int:
            return sum(self._left(order, step).counts.values())

        total, most = left(0), len(order.group)
        removed = int(limit) if what == "count" else round_half_up(limit, total)
        if removed > total - left(most):
            reach = total - left(most)
            raise TargetError(
                f"The target {what} {limit:g} cannot be reached.",
                why=f"at most {reach} of {total} units can go, sparsity {reach / total:.3f}"
                + self.candidates.why_least(),
                hint="Ask for less, lower min_keep or min_keep_fraction, use scope local, or protect less.",
            )
        return removals_for(order, left, total - removed, f"kept units for {what}")

    def _below(self, order: RemovalOrder, limit: float) -> int:
        """Removals of the list that reach every unit with a score below a limit."""
        if self.families:
            raise RecipeError(
                f"target 'threshold' does not apply to {self.request.what}s that must keep equal counts.",
                why="a threshold gives every group its own width",
                hint="Ask for a sparsity, or for params or macs.",
            )
        values = np.concatenate([self.scores[name].double().cpu().numpy().reshape(-1) for name in order.names])
        starts = np.concatenate([[0], np.cumsum(order.sizes)[:-1]])
        below = np.flatnonzero(values[starts[order.group] + order.unit] < limit)
        return int(below[-1]) + 1 if len(below) else 0

    def _for_latency(self, order: RemovalOrder, limit: float) -> int:
        candidates = self.candidates
        return removals_for_latency(
            order,
            lambda step: candidates.write(self._left(order, step).keep).copy(candidates.model),
            lambda step: tuple(self._left(order, step).counts.values()),
            limit,
            Stopwatch(candidates.model, candidates.example),
        )


def _whole_counts(target: Target) -> dict[str, Amount]:
    """What the target gives, with counts as integers: a recipe reads 100 as 100.0, which `Target` found to be whole."""
    given = target.given()
    count = given.get("count")
    if isinstance(count, Mapping):
        given["count"] = {pattern: int(number) for pattern, number in count.items()}
    elif count is not None:
        given["count"] = int(count)
    return given


def _target(request: Request) -> Target:
    if request.target is None:
        raise RecipeError("There is no target.", hint='for example target={"macs": 0.5}, or give keep= or remove=')
    return request.target


def _chunks(family: Family, ranked: Mapping[str, Tensor]) -> Tensor:
    """Worth of the chunks of a family: the mean of the scores that go together, the worst first."""
    scores = torch.stack([ranked[n].double().cpu().sort(stable=True).values for n in family.groups]).mean(0)
    first = family.size - (family.chunks - 1) * family.step
    sizes = [first] + [family.step] * (family.chunks - 1)
    return torch.stack([part.mean() for part in torch.split(scores, sizes)])
