"""Plans that remove slices: the ordered list of removals under one or several targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.amounts.order import Counts, RemovalOrder, removal_order, removals_for
from secateur.criteria.base import Context, Criterion
from secateur.errors import RecipeError, TargetError, UnsupportedError
from secateur.kinds.slices.cut import cut_copy
from secateur.kinds.slices.replay import certify
from secateur.measure.latency import latency
from secateur.planning.plan import Evidence, Plan, counted, fingerprint, removals
from secateur.structure.attributes import edits
from secateur.structure.axes import kept
from secateur.structure.capture import capture
from secateur.structure.cost import CostModel
from secateur.structure.groups import Structure, structure
from secateur.structure.provenance import Attribute
from secateur.types import Certificate, Example, Group

FLOOR = 0.1  # of each group stays under a global ranking, so that no layer is emptied by its scale
AMOUNTS = ("sparsity", "count", "threshold")
COSTS = ("params", "macs", "memory_bytes", "latency_ms")
ROUNDS, WARMUP = 15, 3  # of every latency measurement while searching
STEP = 0.02  # of the units: how far the list is walked on where the final measurement misses the target


def cut_plan(
    model: nn.Module,
    example: Example,
    rule: Criterion,
    granularity: str,
    request: Mapping[str, Any],
    context: Mapping[str, Any],
    *,
    dtype: str,
    tolerance: float | None,
) -> Plan:
    """Decide which slices go; see `make_plan` for the arguments and errors."""
    _check_request(request)
    record = capture(model, example)
    found = structure(model, record, request["protect"])
    groups = found.free(granularity)
    if not groups:
        raise UnsupportedError(
            f"Nothing of {type(model).__name__} can be cut at granularity {granularity!r}.",
            why=_locked_summary(found),
            hint="See `secateur inspect` for what is locked, by which line, and what to do about it.",
        )
    search = _search(model, example, found, groups, CostModel(model, record), request)
    groups = list(search.members)
    scores = rule.score(Context(model, groups, capture=record, **context))
    relative = request["scope"] == "global" and not rule.comparable
    ranked = {name: relative_scores(score) for name, score in scores.items()} if relative else scores
    keep = search.choose(ranked, scores)
    decision = search.decision(keep)
    native = search.native(decision.counts)

    def prove(whole: nn.Module, cut: nn.Module) -> Certificate:
        proof = certify(whole, cut, example, record, decision.atoms, dtype=dtype, tolerance=tolerance)
        if request.get("expressible"):
            _require_native(cut, example)
        return proof

    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups=removals(groups, keep),
        cuts=decision.cuts,
        attributes={**decision.attributes, **native},
        masks={},
        units=counted(granularity, keep),
        cost=search.costs(decision.counts),
        evidence=Evidence(model, groups, scores, keep, found, prove, example),
    )


def _search(model: nn.Module, example: Example, found: Structure, groups: Sequence[Group], *rest: Any) -> Search:
    if not rest[-1].get("expressible"):
        return Search(model, example, found, groups, *rest)
    from secateur.planning.expressible import UniformSearch

    return UniformSearch(model, example, found, groups, *rest)


def _require_native(cut: nn.Module, example: Example) -> None:
    from secateur.planning.expressible import require_native

    require_native(cut, example)


def _check_request(request: Mapping[str, Any]) -> None:
    unknown = sorted(set(request["target"]) - {*AMOUNTS, *COSTS})
    if unknown:
        raise RecipeError(f"unknown target {unknown[0]!r}", hint=f"targets of cuts: {', '.join(AMOUNTS + COSTS)}")
    if not request["target"]:
        raise RecipeError("The target is empty.", hint=f"say one or several of {', '.join(AMOUNTS + COSTS)}")
    if request["scope"] not in ("global", "local"):
        raise RecipeError(f"scope {request['scope']!r} belongs to masks.", hint="Use scope global or local for cuts.")
    if request["allocation"] not in ("global", "uniform"):
        raise RecipeError(
            f"allocation {request['allocation']!r} belongs to masks.", hint="Use global or uniform for cuts."
        )


def relative_scores(score: Tensor) -> Tensor:
    """Scores in units of their group's mean size: weights before a normalisation have no scale of their own."""
    scale = score.abs().double().mean()
    return (score.double() / scale if float(scale) > 0 else score.double()).float()


def _locked_summary(found: Structure) -> str:
    reasons: dict[str, int] = {}
    for group in found.groups:
        for reason in group.locks[:1]:
            text = f"{reason.reason} ({reason.where})" if reason.where else reason.reason
            reasons[text] = reasons.get(text, 0) + 1
    kinds = sorted({g.granularity for g in found.groups if not g.locks})
    free = f"free are only: {', '.join(kinds)}" if kinds else "everything is locked"
    return "; ".join([free, *sorted(reasons, key=lambda r: -reasons[r])[:3]])


@dataclass(frozen=True, eq=False)
class Decision:
    """Keep masks in every form that somebody needs."""

    atoms: dict[int, np.ndarray[Any, np.dtype[np.bool_]]]
    counts: dict[int, int]
    cuts: dict[str, dict[int, Tensor]]
    attributes: dict[Attribute, int]


class Search:
    """Finds the shortest list of removals that meets every target."""

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        found: Structure,
        groups: Sequence[Group],
        cost: CostModel,
        request: Mapping[str, Any],
    ) -> None:
        self.model, self.example, self.found, self.cost, self.request = model, example, found, cost, request
        self.groups = self.members = groups
        self.ids = {g.name: found.atoms[g.name].id for g in groups}
        self.timed: dict[tuple[int, ...], float] = {}
        self.rounded = False

    def choose(self, ranked: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kept units per group; `ranked` orders them, a threshold compares `scores`."""
        scope = "local" if self.request["allocation"] == "uniform" else self.request["scope"]
        floors = {g.name: _floor(g.size, self.request["min_keep"], scope) for g in self.groups}
        steps = {g.name: lcm(self.request["round_to"], g.attributes.get("multiple", 1)) for g in self.groups}
        self.rounded = max(steps.values()) > 1
        order = removal_order(ranked, scope=scope, min_keep=floors, round_to=steps)
        target: Mapping[str, float] = self.request["target"]
        needed = max(
            [0, *(self._removals(order, scores, what, float(v)) for what, v in target.items() if what != "latency_ms")]
        )
        if "latency_ms" in target:
            needed = max(needed, self._removals_for_latency(order, float(target["latency_ms"])))
        return order.keep(needed)

    def decision(self, keep: Mapping[str, Tensor]) -> Decision:
        """Slices and attributes of a choice."""
        atoms = {self.ids[name]: mask.numpy() for name, mask in keep.items() if not bool(mask.all())}
        counts = {i: int(mask.sum()) for i, mask in atoms.items()}
        cuts: dict[str, dict[int, Tensor]] = {}
        for name, axes in self.found.tensors.items():
            for d, axis in enumerate(axes):
                stays = kept(axis, atoms)
                if not stays.all():
                    cuts.setdefault(name, {})[d] = torch.from_numpy(np.flatnonzero(stays))
        return Decision(atoms, counts, cuts, edits(self.model, self.found.trace, counts))

    def native(self, counts: Mapping[int, int]) -> dict[Attribute, int]:
        """What a config is told beside the integers that the forward reads: nothing."""
        return {}

    def costs(self, counts: Mapping[int, int]) -> dict[str, list[int]]:
        """Parameters and multiply-accumulates before and after."""
        return {
            "params": [self.cost.params({}), self.cost.params(counts)],
            "macs": [self.cost.macs({}), self.cost.macs(counts)],
        }

    def _removals(self, order: RemovalOrder, scores: Mapping[str, Tensor], what: str, limit: float) -> int:
        if what == "threshold":
            return below(order, scores, limit)
        if what in ("sparsity", "count"):
            return self._exactly(order, what, limit)
        measures: dict[str, Callable[[Mapping[int, int]], int]] = {
            "macs": self.cost.macs,
            "params": self.cost.params,
            "memory_bytes": self.cost.bytes,
        }
        measure = measures[what]
        bound = limit if what == "memory_bytes" else floor(limit * measure({}))
        return removals_for(order, lambda c: measure(self._by_atom(c)), bound, what)

    def _by_atom(self, counts: Counts) -> dict[int, int]:
        return {self.ids[name]: n for name, n in counts.items()}

    def _exactly(self, order: RemovalOrder, what: str, limit: float) -> int:
        total = int(order.sizes.sum())
        removed = int(limit) if what == "count" else floor(limit * total + 0.5)
        if removed > len(order.group):
            raise TargetError(
                f"The target {what} {limit:g} cannot be reached.",
                why=f"at most {len(order.group)} of {total} units can go, sparsity {len(order.group) / total:.3f}",
                hint="Ask for less, lower min_keep, or use scope local.",
            )
        if not self.rounded:
            return removed
        return removals_for(order, lambda c: sum(c.values()), total - removed, f"kept units for {what}")

    def _removals_for_latency(self, order: RemovalOrder, limit: float) -> int:
        """Bisection over measured latencies, then a longer measurement of the result that must hold."""
        needed = removals_for(order, lambda c: self._latency(order, c, ROUNDS), limit, "latency_ms")
        while self._latency(order, order.kept_counts(needed), 2 * ROUNDS, fresh=True) > limit:
            needed += max(1, int(STEP * len(order.group)))
            if needed > len(order.group):
                raise TargetError(
                    f"The target latency_ms <= {limit:g} was reached once but does not hold.",
                    why="the machine's latency varies more than the cut changes it",
                    hint="Ask for a little more time, or measure on an idle machine.",
                )
        return needed

    def _latency(self, order: RemovalOrder, counts: Counts, rounds: int, *, fresh: bool = False) -> float:
        """Median latency of the model that these counts leave; which units stay makes no difference to it."""
        key = tuple(counts[name] for name in order.names)
        if fresh or key not in self.timed:
            keep = {
                name: torch.arange(int(size)) < counts[name]
                for name, size in zip(order.names, order.sizes, strict=True)
            }
            choice = self.decision(keep)
            model = cut_copy(self.model, choice.cuts, choice.attributes)
            timed = latency({"cut": model}, self.example, rounds=rounds, warmup=WARMUP)
            self.timed[key] = timed["cut"].median
        return self.timed[key]


def _floor(size: int, min_keep: int, scope: str) -> int:
    share = ceil(FLOOR * size) if scope == "global" else 1
    return min(size, max(min_keep, share))


def below(order: RemovalOrder, scores: Mapping[str, Tensor], limit: float) -> int:
    """Removals of the list that reach every unit with a score below a limit."""
    values = np.concatenate([scores[name].double().numpy().reshape(-1) for name in order.names])
    starts = np.concatenate([[0], np.cumsum(order.sizes)[:-1]])
    below = np.flatnonzero(values[starts[order.group] + order.unit] < limit)
    return int(below[-1]) + 1 if len(below) else 0
