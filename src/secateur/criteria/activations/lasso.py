"""LASSO channel selection: which inputs does the next layer need to give the output it gives now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion, register
from secateur.errors import RecipeError
from secateur.statistics.activations.gram import Reading, unit_gram
from secateur.statistics.activations.lasso_path import drop_points, ordered_scores
from secateur.statistics.activations.readings import readings
from secateur.types import Group
from secateur.words import SLICES


def read(context: Context, positions: int | None) -> Iterator[tuple[Group, list[Reading]]]:
    """Second moments of what the consumers of the context's groups read, group by group."""
    assert context.data is not None
    return readings(
        context.model,
        context.data,
        context.groups,
        positions=positions,
        seed=context.seed,
        trace=context.capture,
        progress=context.progress,
    )


def check_positions(positions: int | None) -> None:
    """Refuse a number of places below one.

    Raises:
        RecipeError: it is below 1.
    """
    if positions is not None and positions < 1:
        raise RecipeError(f"positions={positions!r} is below 1", hint="None takes every place")


@register
@dataclass(frozen=True, kw_only=True)
class Lasso(Criterion):
    """Remove first the units that a LASSO regression of the next layer's output drops first.

    The idea: with Z_u the contribution of unit u to the output Y of its consumers, minimise
    1/2 ||Y - sum_u beta_u Z_u||^2 + lambda ||beta||_1 and let lambda grow; a unit that others can stand in for
    is dropped early. It sees redundancy, which no norm does. Refit the consumers after the cut
    (`solve.refit_consumers`): the selection is made for that. A bad choice without data that look like those
    of the task, and where consumers have more inputs than there are rows.

    The exact path is followed (all penalties, no grid), so every number of survivors is met. The score is the
    penalty at which the unit goes, per row and relative to the mean square of Y, raised where it has to be so
    that the order of removal is strict.

    Args:
        positions: places in space taken per image and convolution; None takes all.
        stages: after every stage the survivors' weights are refitted by least squares and the LASSO starts
            again from them, as published; 1 follows one path to the end.

    Raises:
        RecipeError: positions or stages below 1, or no data.
        UnsupportedError: a consumer that is no linear layer or plain convolution.
        ResourceError: a consumer with more than 8192 columns.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        A forward pass for each part of the groups (parts whose moments take at most twice the weights, or 64 MiB) and
        N k^2 multiplications per consumer (N rows, k columns of its weight); then per group about u^4 / 4 for u
        units, and k^3 per stage; no further data.

    Source:
        He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, equations 1 to 4.
    """

    name: ClassVar[str] = "lasso"
    summary: ClassVar[str] = "units that a LASSO regression of the next layer's output drops first matter least"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "medium: no labels, no gradients"
    best_for: ClassVar[str] = "channels of convolutional networks that are refitted instead of retrained"
    granularities: ClassVar[tuple[str, ...]] = SLICES
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True

    positions: int | None = 16
    stages: int = 4

    def __post_init__(self) -> None:
        """Refuse numbers below one."""
        check_positions(self.positions)
        if self.stages < 1:
            raise RecipeError(f"stages={self.stages!r} is below 1", hint="1 follows one path to the end")

    def _score(self, context: Context) -> dict[str, Tensor]:
        scores = {}
        for group, consumers in read(context, self.positions):
            scores[group.name] = _score_group(consumers, group.size, self.stages).view(group.shape)
            del consumers  # before the next part of the groups is gathered
        return scores


def _score_group(consumers: Sequence[Reading], units: int, stages: int) -> Tensor:
    alive = torch.arange(units)
    matrices = [reading.matrix for reading in consumers]
    gram, output = _sums(consumers, units, matrices)
    # The energy of the whole output: points of wide and narrow layers become shares of it.
    scale = max(float(output.sum()), 1e-300)
    order: list[int] = []
    levels: list[float] = []
    for stage in range(stages):
        points = drop_points(gram[alive][:, alive], output[alive]) / scale
        # What is still alive after this stage, counted from the end, so that rounding never leaves a unit over.
        goes = len(alive) - (units * (stages - 1 - stage)) // stages
        # Of equal points the unit with the lower number goes first, on every machine.
        first = torch.argsort(points, stable=True)
        order += alive[first[:goes]].tolist()
        levels += points[first[:goes]].tolist()
        # Sorted again, for the order of the columns decides between equal units.
        alive = alive[first[goes:]].sort().values
        if len(alive) == 0:
            break
        # As published: the next path starts from weights that already make up for what has gone.
        matrices = [_refitted(reading, alive, units) for reading in consumers]
        gram, output = _sums(consumers, units, matrices)
    return ordered_scores(torch.tensor(order), torch.tensor(levels))


def _sums(consumers: Sequence[Reading], units: int, matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    pairs = [unit_gram(reading, units, matrix) for reading, matrix in zip(consumers, matrices, strict=True)]
    return sum((k for k, _ in pairs), torch.zeros(())), sum((b for _, b in pairs), torch.zeros(()))


def _refitted(reading: Reading, alive: Tensor, units: int, ridge: float = 1e-9) -> Tensor:
    """Weights of the columns that survive, so that they give the whole output; zero elsewhere."""
    out = torch.zeros_like(reading.matrix)
    kept = torch.zeros(units, dtype=torch.bool).index_fill_(0, alive, True)
    for g, (gram, matrix, unit) in enumerate(zip(reading.gram, reading.matrix, reading.unit, strict=True)):
        # Columns without unit belong to other groups and are not for this one to take.
        stays = torch.where(unit >= 0, kept[unit.clamp(min=0)], True)
        inner = gram[stays][:, stays]
        # Just enough to solve for columns that depend on each other; the same term on the right keeps their weights.
        damping = ridge * inner.diagonal().mean().clamp(min=1e-300)
        wanted = gram[stays] @ matrix.T + damping * matrix.T[stays]
        solution = torch.linalg.solve(inner + damping * torch.eye(len(inner), dtype=torch.float64), wanted)
        out[g][:, stays] = solution.T
    return out
