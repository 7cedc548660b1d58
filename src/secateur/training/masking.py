"""Zeros during training: masks chosen anew at every update, held in between, regrown where asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.amounts import round_half_up, select
from secateur.criteria.sums import reduce_spans
from secateur.kinds.weights.kind import Weights
from secateur.kinds.weights.nm import NM
from secateur.planning.decide import decide
from secateur.planning.plan import Plan
from secateur.planning.written import plan_of_masks
from secateur.request import Target
from secateur.training.held_units import Held
from secateur.training.regrowth.base import Regrowth
from secateur.training.removal import PruningJob, Remover


class Masking(Remover):
    """Masks of weights.

    Args:
        job: what it works with.
        candidates: the weights that may be masked.
    """

    physical = False

    def __init__(self, job: PruningJob, candidates: Weights) -> None:
        super().__init__(job)
        self.candidates = candidates
        self.held = Held(job.model, candidates.groups, job.optimizers, job.ema, keep_originals=False)
        self.groups = self.held.groups

    @property
    def keep(self) -> dict[str, Tensor]:
        """Group name -> bool tensor, True = the unit stays; empty before the first update."""
        return self.held.keep

    def whole(self, what: str) -> int:
        """Units; bytes stay."""
        if what != "count":
            self.candidates.price(what, None)  # type: ignore[arg-type]  # refuses, in words
        return sum(group.size for group in self.groups.values())

    def removed(self) -> tuple[int, int]:
        """Masked units, and all."""
        return self.held.removed()

    def prune(self, target: Target, *, last: bool) -> None:
        """Score, decide, mask; what is masked already goes before everything else."""
        self.decide(stuck(self.job.scores(self.candidates), self.keep), target, last=last)

    def decide(self, scores: Mapping[str, Tensor], target: Target, *, last: bool) -> None:
        """Mask by given scores.

        Args:
            scores: group name -> scores, higher = keep.
            target: how much.
            last: whether it is the final amount.
        """
        pattern = self.candidates.unit if isinstance(self.candidates.unit, NM) else None
        if pattern is not None and not last:
            keep: Mapping[str, Tensor] = self._towards(pattern, scores, target)
        else:
            request = replace(self.job.request, target=target)
            keep = decide(self.candidates, scores, request, comparable=self.job.rule.comparable)
        self.held.hold(self.job.together.same(keep))

    def regrow(self, rule: Regrowth, time: float, gradients: Mapping[str, Tensor], step: int) -> None:
        """Exchange some of the kept units of every group for as many masked ones.

        Args:
            rule: how many, and which.
            time: share of the time that is gone.
            gradients: of the weights, masked ones included.
            step: for what is drawn.
        """
        weights = {name: p.detach().abs() for name, p in self.job.model.named_parameters() if p.is_floating_point()}
        generator = torch.Generator().manual_seed(self.job.request.seed * 1_000_003 + step)
        keep = {}
        for name, kept in self.keep.items():
            group = self.groups[name]
            gone = kept.numel() - int(kept.sum())
            count = min(round_half_up(rule.share(time), kept.numel() - gone), gone)
            if count == 0:
                keep[name] = kept
                continue
            worth = stuck({name: reduce_spans(weights, group).float()}, self.keep)
            left = select(worth, count=gone + count)[name]
            wish = rule.wish(group, gradients, generator).to(left.device)
            # Best wishes among what is not kept: lowest of their negatives, with everything that is kept far above.
            ranked = (-wish).masked_fill(left, torch.finfo(torch.float32).max)
            keep[name] = left | ~select({name: ranked}, count=count)[name]
        self.held.hold(self.job.together.same(keep))

    def enforce(self) -> None:
        """Write the zeros again."""
        self.held.enforce()

    def enforce_unheld(self) -> None:
        """Write the zeros again that no optimizer holds."""
        self.held.enforce_unheld()

    def plan(self) -> Plan | None:
        """A plan of exactly these masks."""
        return plan_of_masks(self.job.model, self.held.handle.masks) if self.keep else None

    def state_dict(self) -> dict[str, object]:
        """The units that stay."""
        return self.held.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Mask as the checkpoint was masked."""
        self.held.load_state_dict(state)

    def _towards(self, pattern: NM, scores: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
        """A part of what an n:m pattern removes: the lowest scores of it, so that every update leads towards it."""
        whole = select(scores, granularity=pattern, groups=list(self.groups.values()))
        gone = sum(mask.numel() - int(mask.sum()) for mask in whole.values())
        count = round_half_up(target.numbers()["sparsity"] / (1 - pattern.n / pattern.m), gone)
        top = torch.finfo(torch.float32).max
        return dict(select({name: score.masked_fill(whole[name], top) for name, score in scores.items()}, count=count))


def stuck(scores: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores in which what is gone lies below everything else, so that it stays gone.

    Args:
        scores: group name -> scores, higher = keep.
        keep: group name -> bool, True = the unit is there; groups that are left out are whole.
    """
    # Sizes stay sizes, which some allocations square and add up; asked of all at once, since all compete.
    least = 0.0 if all(bool((score >= 0).all()) for score in scores.values()) else torch.finfo(torch.float32).min
    above = torch.finfo(torch.float32).tiny if least == 0 else None
    result = {}
    for name, score in scores.items():
        gone = ~keep[name].to(score.device) if name in keep else None
        result[name] = score if above is None else score.clamp(min=above)
        result[name] = result[name] if gone is None else result[name].masked_fill(gone, least)
    return result
