"""Whole experts: equally many from every block of a size, as one number in the config says how many there are."""

from __future__ import annotations

from torch import nn

from secateur.kinds.base import Family, Keep, nothing
from secateur.kinds.edit import Edit
from secateur.kinds.experts.find import Mixture, expert_counts, find_mixtures, split_routers
from secateur.kinds.experts.prove import certify_experts
from secateur.kinds.expressible import require_native, require_transformers
from secateur.kinds.slices.kind import Decision, Slices
from secateur.model.agreement import worst
from secateur.request import PROOF, Efforts
from secateur.types import Certificate, Group


class Experts(Slices):
    """Fused experts that a router addresses by number."""

    # The largest blocks lose one at a time and smaller ones their share: counts, not scores, compare the blocks.
    scope = "local"
    unread = ("scales",)
    saves = "params"  # experts that go leave the work of every token as it is
    mixtures: list[Mixture]

    def _found(self) -> list[Group]:
        split = split_routers(self.structure, self.model)
        mixtures = find_mixtures(self.model, self.trace, self.structure, self.request.protect)
        self.mixtures = [mixture for mixture in mixtures if not mixture.locks]
        if not self.mixtures:
            reasons = sorted({f"{k.reason} ({k.where})" if k.where else k.reason for m in mixtures for k in m.locks})
            why = "no router and weights of three dimensions, [experts, ...], were found that belong together"
            if split:
                why = f"{split[0]!r} deals its experts out in groups of fixed size"
            raise nothing(
                self.model,
                "experts that can be removed",
                why="; ".join(reasons[:3]) or why,
                hint="Cut channels inside the experts instead (granularity: channel).",
            )
        near = [c for c in self.trace.rounded if any(_holds(m, c.module) for m in self.mixtures)]
        self.conditions = (*self.conditions, *near)
        groups = self.structure.free("expert")
        self.families = [self._family(size, groups) for size in sorted({group.size for group in groups}, reverse=True)]
        return groups

    def _family(self, size: int, groups: list[Group]) -> Family:
        members = [group for group in groups if group.size == size]
        # A router picks so many experts per token: with fewer left it would have nothing to choose from.
        least = max(self.request.min_keep, *(group.attributes["used"] for group in members), 1)
        return Family(f"{size} experts", tuple(g.name for g in members), size, least=min(least, size))

    def why_least(self) -> str:
        """Routers pick so many."""
        return f"; routers use {max(group.attributes['used'] for group in self.groups)} per token"

    def _tie_to_config(self) -> None:
        require_transformers(self.model)

    def decision(self, keep: Keep) -> Decision:
        """Slices, and every integer that counts experts."""
        choice = super().decision(keep)
        left = {m.size: choice.counts[m.atom.id] for m in self.mixtures if m.atom.id in choice.counts}
        counted = expert_counts(self.model, self.structure, self.mixtures, left)
        return Decision(choice.atoms, choice.counts, choice.cuts, {**choice.attributes, **counted})

    def prove(
        self,
        whole: nn.Module,
        cut: nn.Module,
        keep: Keep,
        *,
        dtype: str,
        tolerance: float | None,
        effort: Efforts = PROOF,
        edit: Edit | None = None,
    ) -> Certificate:
        """By the original whose routers cannot choose what is gone: a replay would choose it again."""
        choice = self.decision(keep)
        runs = zip((self.example, *self.examples), (self.trace, *self.trace.further), strict=True)
        proof = worst(
            certify_experts(
                whole,
                cut,
                example,
                trace,
                self.mixtures,
                choice.atoms,
                choice.cuts,
                dtype=dtype,
                tolerance=tolerance,
                effort=effort,
            )
            for example, trace in runs
        )
        if self.request.expressible:
            require_native(cut, self.example)
        return proof


def _holds(mixture: Mixture, module: str) -> bool:
    """Whether a module is a part of the block, or one that it is in."""
    inside, around = f"{module}.".startswith(f"{mixture.path}."), f"{mixture.path}.".startswith(f"{module}.")
    return not mixture.path or not module or inside or around
