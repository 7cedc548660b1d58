"""ThiNet: greedily leave out the channels whose joint contribution to the next layer is smallest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.activations.lasso import check_positions, read
from secateur.criteria.base import Context, Criterion, register
from secateur.statistics.activations.gram import unit_gram
from secateur.statistics.activations.lasso_path import ordered_scores
from secateur.words import SLICES


@register
@dataclass(frozen=True, kw_only=True)
class ThiNet(Criterion):
    """Remove first the units whose contributions to the next layer's output are smallest together.

    The idea: with Z_u the contribution of unit u to the output of its consumers, add to the removed set T the
    unit that keeps ||sum over T of Z_u||^2 smallest. Contributions that cancel go together. The score is that
    sum relative to the mean square of the output, raised where it has to be so that the order is strict. A bad
    choice where units are redundant but large (duplicates): it knows no refit; "lasso" and "structured-obs" do.

    Args:
        positions: places in space taken per image and convolution; None takes all.

    Raises:
        RecipeError: positions below 1, or no data.
        UnsupportedError: a consumer that is no linear layer or plain convolution.
        ResourceError: a consumer with more than 8192 columns.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        A forward pass for each part of the groups (parts whose moments take at most twice the weights, or 64 MiB) and
        N k^2 multiplications per consumer (N rows, k columns of its weight); then u^2 per group. All outputs
        at the sampled places count; the paper samples one output per place.

    Source:
        Luo, Wu, Lin, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression", 2017,
        equation 6 and algorithm 1.
    """

    name: ClassVar[str] = "thinet"
    summary: ClassVar[str] = "units whose joint contribution to the next layer is smallest go first"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "medium: no labels, no gradients"
    best_for: ClassVar[str] = "channels of convolutional networks that are refitted or fine-tuned"
    granularities: ClassVar[tuple[str, ...]] = SLICES
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})
    shares: ClassVar[bool] = True

    positions: int | None = 16

    def __post_init__(self) -> None:
        """Refuse numbers below one."""
        check_positions(self.positions)

    def _score(self, context: Context) -> dict[str, Tensor]:
        scores = {}
        for group, consumers in read(context, self.positions):
            # Consumers of one group add up: the unit goes from all of them at once.
            gram = sum((unit_gram(reading, group.size)[0] for reading in consumers), torch.zeros(()))
            order, errors = greedy_order(gram)
            scores[group.name] = ordered_scores(order, errors / gram.sum().clamp(min=1e-300)).view(group.shape)
            del consumers  # before the next part of the groups is gathered
        return scores


def greedy_order(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Units in the order in which they go, and ||sum over the removed Z_u||^2 after each.

    Args:
        gram: <Z_u, Z_v>, float64 [u, u].

    Example:
        The first two cancel, so the second goes right after the first although it is large.

        >>> gram = torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.1, 0.0], [0.0, 0.0, 4.05]]).double()
        >>> [x.tolist() for x in greedy_order(gram)[0:1]]
        [[0, 1, 2]]
    """
    units = len(gram)
    order: list[int] = []
    errors = torch.zeros(units, dtype=torch.float64)
    error, cross = torch.zeros((), dtype=torch.float64), torch.zeros(units, dtype=torch.float64)
    gone = torch.zeros(units, dtype=torch.bool)
    for step in range(units):
        # The error after removal of one more, from the error so far: ||Z_S + Z_u||^2, expanded.
        after = torch.where(gone, torch.inf, error + 2 * cross + gram.diagonal())
        best = int(after.argmin())
        error, cross = after[best], cross + gram[best]
        gone[best] = True
        order.append(best)
        errors[step] = error
    return torch.tensor(order), errors.clamp(min=0)  # a sum of squares; rounding may have taken it below zero
