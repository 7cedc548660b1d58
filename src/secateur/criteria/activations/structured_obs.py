"""Structured Optimal Brain Surgeon on the next layer: the inputs that the others can replace best go first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.activations.lasso import check_positions, read
from secateur.criteria.base import Context, Criterion, register
from secateur.errors import RecipeError
from secateur.statistics.activations.gram import Reading
from secateur.statistics.activations.lasso_path import ordered_scores
from secateur.statistics.curvature.inverse import damped_cholesky
from secateur.words import SLICES


@register
@dataclass(frozen=True, kw_only=True)
class StructuredOBS(Criterion):
    """Remove first the units without which the refitted next layer gives nearly the same output.

    The idea: for a consumer Y = X W^T with H = X^T X, leaving out the columns Q and refitting the others costs
    tr W_Q ([H^-1]_QQ)^-1 W_Q^T exactly. The cheapest unit goes, weights and inverse are updated, and so on:
    redundancy is seen at every step. Refit the consumers after the cut (`solve.refit_consumers`). A bad choice
    with fewer rows of data than columns: the inverse then is mostly damping.

    The score is the summed cost relative to the mean square of the output, raised where it has to be so that
    the order of removal is strict.

    Args:
        positions: places in space taken per image and convolution; None takes all.
        damping: added to the diagonal of H, relative to its mean.

    Raises:
        RecipeError: positions below 1, damping not above 0, or no data.
        UnsupportedError: a consumer that is no linear layer or plain convolution.
        ResourceError: a consumer with more than 8192 columns.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        A forward pass for each part of the groups (parts whose moments take at most twice the weights, or 64 MiB) and
        N k^2 multiplications per consumer (N rows, k columns of its weight); then about k^3 per consumer for the
        updates and u k q n / 2 for the costs (q columns per unit, n outputs).

    Source:
        Hassibi, Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", 1992, equation 5,
        for sets of columns; Kurtic, Frantar, Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language
        Models", 2023, equations 2 and 3.
    """

    name: ClassVar[str] = "structured-obs"
    summary: ClassVar[str] = "units that the refitted next layer misses least go first: Optimal Brain Surgeon"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "slow for wide layers: no labels, no gradients"
    best_for: ClassVar[str] = "neurons, heads and channels that are refitted instead of retrained"
    granularities: ClassVar[tuple[str, ...]] = SLICES
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True

    positions: int | None = 16
    damping: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        check_positions(self.positions)
        if not self.damping > 0:
            raise RecipeError(f"damping={self.damping!r} is not above 0", hint="1e-4 is the default")

    def _score(self, context: Context) -> dict[str, Tensor]:
        scores = {}
        for group, consumers in read(context, self.positions):
            order, errors = surgeon_order(consumers, group.size, self.damping)
            scores[group.name] = ordered_scores(order, errors).view(group.shape)
            del consumers  # before the next part of the groups is gathered
        return scores


class _Layer:
    """One consumer, or one group of a convolution, while units go."""

    def __init__(self, gram: Tensor, matrix: Tensor, unit: Tensor, damping: float) -> None:
        # Relative damping, so that one value fits layers whose inputs differ in scale by orders of magnitude.
        size = float(gram.diagonal().mean())
        factor, _ = damped_cholesky(gram, max(damping * size, 1e-30), "the second moments of a layer's input")
        self.inverse = torch.cholesky_inverse(factor)
        # Both are updated while units go; the reading itself serves other criteria.
        self.matrix = matrix.clone()
        self.columns = [torch.nonzero(unit == u).flatten() for u in range(int(unit.max()) + 1)]

    def costs(self, alive: Tensor) -> Tensor:
        """Cost of every unit that is alive, infinite for the others; units of equal width together."""
        cost = torch.zeros(len(alive), dtype=torch.float64)
        widths: dict[int, list[int]] = {}
        for u in torch.nonzero(alive).flatten().tolist():
            if u < len(self.columns) and len(self.columns[u]):
                widths.setdefault(len(self.columns[u]), []).append(u)
        # Units of equal width form one batch of small factorisations: one call in place of hundreds.
        for units in widths.values():
            index = torch.stack([self.columns[u] for u in units])
            block = self.inverse[index[:, :, None], index[:, None, :]]
            weights = self.matrix[:, index].permute(1, 2, 0)
            # ||L^-1 w||^2 is w^T B^-1 w without the inverse of B, which may be nearly singular.
            factor = torch.linalg.cholesky(block)
            half = torch.linalg.solve_triangular(factor, weights, upper=False)
            cost[torch.tensor(units)] = half.square().sum((1, 2))
        return cost

    def remove(self, unit: int) -> None:
        """Leave out the columns of a unit and update the others; what is gone is decoupled."""
        if unit >= len(self.columns) or len(self.columns[unit]) == 0:
            return
        gone = self.columns[unit]
        block = self.inverse[gone][:, gone]
        step = torch.linalg.solve(block, self.inverse[gone])
        # The block form of the update: the survivors take over what the columns did, and H^-1 shrinks to theirs.
        self.matrix -= self.matrix[:, gone] @ step
        self.inverse -= self.inverse[:, gone] @ step
        # Exactly zero, not to rounding, so that columns that have gone can never come back into a cost.
        self.matrix[:, gone] = 0.0
        self.inverse[gone] = self.inverse[:, gone] = 0.0
        # A unit diagonal keeps the blocks of later units factorisable.
        self.inverse[gone, gone] = 1.0


def surgeon_order(consumers: Sequence[Reading], units: int, damping: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Units in the order in which they go, and the summed relative cost after each.

    Args:
        consumers: who reads the units.
        units: how many there are.
        damping: relative to the mean diagonal of H.

    Returns:
        int64 [u] and float64 [u].
    """
    layers, scale = [], 0.0
    for reading in consumers:
        # The mean energy of what the consumer gives: costs become shares of it and compare across layers.
        scale += float(((reading.matrix @ reading.gram) * reading.matrix).sum())
        for gram, matrix, unit in zip(reading.gram, reading.matrix, reading.unit, strict=True):
            layers.append(_Layer(gram, matrix, unit, damping))
    alive = torch.ones(units, dtype=torch.bool)
    order: list[int] = []
    errors: list[float] = []
    # To the last unit: scores must rank any amount, also what a target never reaches.
    for _ in range(units):
        cost = sum((layer.costs(alive) for layer in layers), torch.zeros(units, dtype=torch.float64))
        best = int(torch.where(alive, cost, torch.inf).argmin())
        for layer in layers:
            layer.remove(best)
        alive[best] = False
        order.append(best)
        errors.append((errors[-1] if errors else 0.0) + float(cost[best]) / max(scale, 1e-300))
    return torch.tensor(order), torch.tensor(errors, dtype=torch.float64)
