"""Gradual ADMM: weights and mask are found together; conjugate gradients may polish what the mask leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.registry import one_of
from secateur.solve.base import SOLVERS, Problem, Solved, Solver
from secateur.solve.least_squares import polish
from secateur.solve.moments import SecondMoments
from secateur.solve.patterns import Pattern

EXACT = 3  # last steps that choose, whose masks have the exact count
RISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the mask that changed -> growth of the penalty


@SOLVERS.register("admm")
@dataclass(frozen=True, kw_only=True)
class Admm(Solver):
    """Two copies of the weights, one free and one under the mask, are pulled together.

    In coordinates in which H has a unit diagonal, where magnitude is Wanda's score:
    V = (V0 H + p (D - Y)) (H + p I)^-1, D = the mask of V + Y, Y = Y + V - D. The mask is chosen anew while removals
    rise by a cubic schedule, then it is fixed. One factorisation serves all steps; with schedule "rising" all removals
    are made at once, and the penalty p grows as the mask settles.

    Of wide layers the masks of all but the last three choosing steps come from a part of the columns, so that they miss
    their count by little; the last ones are exact. On processors that multiply bfloat16 what changes from step to step
    is rounded to it, but for the last step. The error of a layer stays what it was (benchmarks/README.md).

    Args:
        steps: in all. The paper's are twenty, with 15 that choose and p = 1: half as much time again for the same error
            of a layer (benchmarks/README.md).
        choosing: steps in which the mask is chosen.
        penalty: p; the first one where it rises. At 0.3 the error of a layer is 6 to 10 % larger.
        schedule: "gradual" (removals rise, p stays) or "rising" (all removals at once, p rises).
        polish: steps of conjugate gradients at the end, ten for example. They lower the error of the layer, and cost a
            third of the time; perplexity did not fall with them, so 0 is the default.

    Source:
        Boza, "Fast and Effective Weight Update for Pruned Large Language Models", 2024, algorithm 2. Meng et al.,
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", 2024, section 3.2.
    """

    name: ClassVar[str] = "admm"
    summary: ClassVar[str] = "mask and weights together by alternating directions"
    steps: int = 10
    choosing: int = 7
    penalty: float = 0.5
    schedule: str = "gradual"
    polish: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        one_of("schedule", self.schedule, ("gradual", "rising"))
        for name, least in (("steps", 1), ("choosing", 1), ("polish", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(f"{name}={value!r} is not a whole number of at least {least}")
        if not self.penalty > 0:
            raise RecipeError(f"penalty={self.penalty!r} is not above 0")

    def solve(self, problem: Problem) -> Solved:
        """See `Solver.solve`."""
        moments = problem.moments
        goal = problem.weight * moments.scale
        goal[:, moments.dead] = 0
        solve = self._gradual if self.schedule == "gradual" else self._rising
        found, mask = solve(goal, moments, problem.pattern)
        weight = found / moments.scale
        if self.polish:
            weight = polish(problem.weight, weight, mask, moments, self.polish)
        return Solved.of(weight, mask)

    def _gradual(self, goal: Tensor, moments: SecondMoments, pattern: Pattern) -> tuple[Tensor, Tensor]:
        pull = self.penalty * moments.inverse(self.penalty)
        # V = fixed + (D - Y) pull, since H (H + p I)^-1 = I - pull: what changes from step to step costs one product.
        fixed = torch.addmm(goal, goal, pull, alpha=-1)
        rounded = pull.bfloat16() if multiplies_bfloat16(goal) else None
        free, apart, dual = goal.clone(), goal, torch.zeros_like(goal)
        kept, mask, factor = goal, torch.ones_like(goal, dtype=torch.bool), torch.ones_like(goal)
        choosing = min(self.choosing, self.steps)
        for step in range(self.steps):
            both = dual.add_(free)
            if step < choosing:
                choose = pattern.nearly if step < choosing - EXACT else pattern.keep
                mask = choose(both.abs(), 1 - (1 - (step + 1) / choosing) ** 3)
                # Products with numbers are several times faster than choices by truth values.
                factor = mask.to(goal.dtype)
            kept = both * factor
            if step == self.steps - 1:
                break
            dual = both.sub_(kept)
            before, apart = apart, kept - dual
            if rounded is None or step == self.steps - 2:
                free = torch.addmm(fixed, apart, pull)
            else:
                # Rounding is relative to what changed in this step, less each time; the last product makes up for it.
                free.add_((apart - before).bfloat16() @ rounded)
        return kept, mask

    def _rising(self, goal: Tensor, moments: SecondMoments, pattern: Pattern) -> tuple[Tensor, Tensor]:
        values, vectors = moments.eigen
        product = goal @ moments.normalised
        penalty, dual = self.penalty, torch.zeros_like(goal)
        mask = pattern.keep(goal.abs())
        kept, before = goal * mask, mask
        for step in range(10 * self.steps):
            free = ((product + penalty * (kept - dual)) @ vectors / (values + penalty)) @ vectors.T
            mask = pattern.keep((free + dual).abs())
            kept = (free + dual) * mask
            dual = dual + free - kept
            if step % 3 == 2:
                changed = float((mask != before).float().mean())
                if changed == 0 and step >= self.steps:
                    break
                penalty *= next(rise for least, rise in RISES if changed >= least)
                before = mask
        return kept, mask


def multiplies_bfloat16(like: Tensor) -> bool:
    """Whether products in bfloat16 are made in hardware where float32 numbers like these are: about twice as fast."""
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return False
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # PyTorch 2.9 tells nothing
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
