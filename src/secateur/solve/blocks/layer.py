"""One layer: targets of the original model under pruned inputs, the solver, and a guard on tokens that it never saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.solve.base import Problem, Solved, Solver, error_of
from secateur.solve.blocks.sums import GramSums
from secateur.solve.moments import SecondMoments
from secateur.solve.patterns import Pattern


@dataclass(frozen=True)
class LayerRecord:
    """What is known of a solved matrix.

    Args:
        name: of its parameter, with [number] for one matrix of a stack.
        removed, total: weights.
        tokens: that its inputs were learned from.
        error: mean square of what is lost on held-out tokens, relative to the outputs; None without any. With targets
            of the original only what is beyond the loss of the layers before: below 0 where some of that comes back.
        plain: the same for the mask on unmoved weights.
        shrinkage: share of the correction towards the original's outputs that was taken.
        damping: that the factorisation took.
        kept_plain: the update was refused, since it made the held-out error larger.
        beyond: the errors do not hold what layers before have lost.
    """

    name: str
    removed: int
    total: int
    tokens: int
    error: float | None = None
    plain: float | None = None
    shrinkage: float = 0.0
    damping: float = 0.0
    kept_plain: bool = False
    beyond: bool = False


class LayerInputs:
    """What all layers that read the same input share.

    Args:
        seen: sums that the solver may use.
        held: sums over held-out tokens; None where there are too few.
        damping: of the factorisation.
    """

    def __init__(self, seen: GramSums, held: GramSums | None, damping: float) -> None:
        self.moments = SecondMoments(seen.mean(), damping=damping, tokens=seen.tokens)
        self.cross = seen.mean_cross()
        self.held = None if held is None or held.tokens == 0 else held


def solve_layer(
    name: str, weight: Tensor, inputs: LayerInputs, pattern: Pattern, solver: Solver, shrinkage: float | None = None
) -> tuple[Solved, LayerRecord]:
    """Solve one matrix.

    Args:
        name: for the record.
        weight: as it came, [o, d].
        inputs: what it reads.
        pattern: which mask, and how many weights go.
        solver: how.
        shrinkage: share of the correction to take, in [0, 1]; None: the share that is best on the held-out tokens.

    Returns:
        mask and weights, and what is known of them.
    """
    target, share = _target(weight, inputs, shrinkage) if solver.moves else (weight, 0.0)
    solved = solver.solve(Problem(target, inputs.moments, pattern))
    total, removed = solved.mask.numel(), int((~solved.mask).sum())
    damping = inputs.moments.damping if solver.needs_gram else 0.0
    if inputs.held is None or not solver.needs_gram:
        return solved, LayerRecord(name, removed, total, inputs.moments.tokens, shrinkage=share, damping=damping)
    plain = Solved.of(weight, solved.mask)
    held = _Held(weight, inputs.held)
    without = held.error(plain.weight)
    error = held.error(solved.weight) if solver.moves else without
    refused = error > without
    size = max(error_of(weight, held.gram), 1e-30)
    errors, beyond = (min(error, without) / size, without / size), held.missed is not None
    record = LayerRecord(
        name, removed, total, inputs.moments.tokens, *errors, share, damping, kept_plain=refused, beyond=beyond
    )
    return (plain if refused else solved), record


def _target(weight: Tensor, inputs: LayerInputs, shrinkage: float | None) -> tuple[Tensor, float]:
    """W + a W C H^-1: the weights whose outputs on pruned inputs come nearest to the original's outputs.

    With few tokens the correction fits what is peculiar to them. Its share a is the one with the least error on
    held-out tokens, which is a parabola: with G = W C H^-1 the error is a^2 tr(G H' G^T) - 2 a tr(G (W C')^T).
    """
    if inputs.cross is None:
        return weight, 0.0
    scaled = (weight @ inputs.cross) / inputs.moments.scale
    correction = (scaled @ inputs.moments.inverse(0.0)) / inputs.moments.scale
    if shrinkage is None:
        held = inputs.held
        if held is None or held.cross is None:
            shrinkage = 0.5
        else:
            gain = float((correction * (weight @ held.mean_cross())).sum(dtype=torch.float64))  # type: ignore[operator]
            bend = error_of(correction, held.mean())
            shrinkage = min(max(gain / bend, 0.0), 1.0) if bend > 0 else 0.0
    return weight + shrinkage * correction, shrinkage


class _Held:
    """Mean square by which outputs on held-out tokens miss the original's, but for what no weights can change."""

    def __init__(self, weight: Tensor, held: GramSums) -> None:
        self.weight, self.gram = weight, held.mean()
        cross = held.mean_cross()
        self.missed = None if cross is None else weight @ cross

    def error(self, found: Tensor) -> float:
        """Of weights in the place of the original's."""
        change = self.weight - found
        shift = 0.0 if self.missed is None else 2 * float((change * self.missed).sum(dtype=torch.float64))
        return error_of(change, self.gram) + shift
