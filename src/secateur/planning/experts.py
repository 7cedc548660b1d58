"""Plans that remove whole experts: equally many from every block, as one number in the config says how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.base import Context, Criterion
from secateur.errors import RecipeError, TargetError, UnsupportedError
from secateur.kinds.experts.find import Mixture, expert_counts, find_mixtures, split_routers
from secateur.kinds.experts.prove import certify_experts
from secateur.planning.cuts import Decision, Search
from secateur.planning.expressible import require_native, require_transformers
from secateur.planning.plan import Evidence, Plan, counted, fingerprint, removals
from secateur.structure.capture import capture
from secateur.structure.cost import CostModel
from secateur.structure.groups import Structure, structure
from secateur.structure.trace import Trace
from secateur.types import Certificate, Example, Group

TARGETS = ("sparsity", "count", "params", "macs", "memory_bytes")


def expert_plan(
    model: nn.Module,
    example: Example,
    rule: Criterion,
    request: Mapping[str, Any],
    context: Mapping[str, Any],
    *,
    dtype: str,
    tolerance: float | None,
) -> Plan:
    """Decide which experts go; see `make_plan` for the arguments and errors."""
    _check_request(request)
    if request.get("expressible"):
        require_transformers(model)
    record = capture(model, example)
    found, mixtures, groups = _found(model, record, request["protect"])
    search = ExpertSearch(model, example, found, groups, CostModel(model, record), request)
    search.mixtures = mixtures
    scores = rule.score(Context(model, groups, capture=record, **context))
    keep = search.choose(scores, scores)
    decision = search.decision(keep)

    def prove(whole: nn.Module, cut: nn.Module) -> Certificate:
        proof = certify_experts(
            whole, cut, example, record, mixtures, decision.atoms, decision.cuts, dtype=dtype, tolerance=tolerance
        )
        if request.get("expressible"):
            require_native(cut, example)
        return proof

    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups=removals(groups, keep),
        cuts=decision.cuts,
        attributes=decision.attributes,
        masks={},
        units=counted("expert", keep),
        cost=search.costs(decision.counts),
        evidence=Evidence(model, groups, scores, keep, found, prove, example),
    )


def expert_groups(model: nn.Module, record: Trace, protect: Sequence[str] = ()) -> list[Group]:
    """Blocks of experts as groups whose units are the experts."""
    return _found(model, record, protect)[2]


def _found(model: nn.Module, record: Trace, protect: Sequence[str]) -> tuple[Structure, list[Mixture], list[Group]]:
    found = structure(model, record, protect)
    split = split_routers(found, model)
    mixtures = find_mixtures(model, record, found, protect)
    free = [m for m in mixtures if not m.locks]
    if free:
        return found, free, found.free("expert")
    reasons = sorted({f"{k.reason} ({k.where})" if k.where else k.reason for m in mixtures for k in m.locks})
    why = "no router and weights of three dimensions, [experts, ...], were found that belong together"
    if split:
        why = f"{split[0]!r} deals its experts out in groups of fixed size"
    raise UnsupportedError(
        f"{type(model).__name__} has no experts that can be removed.",
        why="; ".join(reasons[:3]) or why,
        hint="Cut channels inside the experts instead (granularity: channel).",
    )


def _check_request(request: Mapping[str, Any]) -> None:
    target = request["target"]
    unknown = sorted(set(target) - set(TARGETS))
    if unknown or not target:
        what = f"target {unknown[0]!r} does not apply to experts." if unknown else "The target is empty."
        raise RecipeError(what, hint=f"say one or several of {', '.join(TARGETS)}")
    if request["scope"] not in ("global", "local") or request["allocation"] not in ("global", "uniform"):
        raise RecipeError(
            f"scope {request['scope']!r} with allocation {request['allocation']!r} does not apply to experts.",
            hint="Use scope global or local, and allocation global or uniform.",
        )


class ExpertSearch(Search):
    """The fewest experts per block that meet every target."""

    mixtures: Sequence[Mixture] = ()

    def choose(self, ranked: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kept experts per block: the best ones of each, equally many where blocks are equally large."""
        ladder = [self._counts(step) for step in range(max(g.size for g in self.groups))]
        chosen = next((counts for counts in ladder if self._meets(counts)), None)
        if chosen is None:
            used = max(g.attributes["used"] for g in self.groups)
            most = sum(g.size - ladder[-1][g.name] for g in self.groups)
            total = sum(g.size for g in self.groups)
            raise TargetError(
                f"The target {dict(self.request['target'])} cannot be reached.",
                why=f"at most {most} of {total} experts can go; routers use {used} per token",
                hint="Ask for less, lower min_keep, or cut channels inside the experts as well.",
            )
        keep = {}
        for group in self.groups:
            order = torch.argsort(ranked[group.name].double().flatten().cpu(), stable=True)
            keep[group.name] = torch.ones(group.size, dtype=torch.bool)
            keep[group.name][order[: group.size - chosen[group.name]]] = False
        return keep

    def decision(self, keep: Mapping[str, Tensor]) -> Decision:
        """Slices, and every integer that counts experts."""
        choice = super().decision(keep)
        left = {m.size: choice.counts[m.atom.id] for m in self.mixtures if m.atom.id in choice.counts}
        counted = expert_counts(self.model, self.found, self.mixtures, left)
        return Decision(choice.atoms, choice.counts, choice.cuts, {**choice.attributes, **counted})

    def _counts(self, step: int) -> dict[str, int]:
        """Kept experts after so many steps; the largest blocks lose one per step, smaller ones their share.

        Blocks of one size stop at the same count, the one that the most demanding of them needs.
        """
        largest, grid = max(g.size for g in self.groups), self.request["round_to"]
        least: dict[int, int] = {}
        for g in self.groups:
            least[g.size] = max(least.get(g.size, 1), g.attributes["used"], self.request["min_keep"])
        kept = {g.name: max(g.size - step * g.size // largest, min(least[g.size], g.size)) for g in self.groups}
        return {g.name: min(g.size, -(-kept[g.name] // grid) * grid) for g in self.groups}

    def _meets(self, counts: Mapping[str, int]) -> bool:
        total = sum(g.size for g in self.groups)
        gone = total - sum(counts.values())
        atoms = {self.ids[name]: n for name, n in counts.items()}
        target: Mapping[str, float] = self.request["target"]
        measures = {"macs": self.cost.macs, "params": self.cost.params, "memory_bytes": self.cost.bytes}
        for what, limit in target.items():
            if what in ("sparsity", "count"):
                met = gone >= (int(limit) if what == "count" else floor(limit * total + 0.5))
            else:
                measure = measures[what]
                met = measure(atoms) <= (limit if what == "memory_bytes" else floor(limit * measure({})))
            if not met:
                return False
        return True
