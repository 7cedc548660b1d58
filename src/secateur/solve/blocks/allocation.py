"""How much each block gives up, told by Wanda's scores of the original: unequal shares whose mean is the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.model.call import call
from secateur.solve.blocks.inventory import Inventory
from secateur.solve.blocks.products import MatrixSite, Products, Use
from secateur.solve.blocks.settings import UnequalShares
from secateur.solve.blocks.sums import rows_of
from secateur.types import Example

STEPS = 16  # in which a curve is followed from the least share to the largest
LEAST, MOST = 0.0, 0.99  # shares that a block may end with


@dataclass(eq=False)
class _Squares:
    """Mean squares of what a matrix reads."""

    total: Tensor
    tokens: int
    turned: bool
    geometry: bool

    def norms(self) -> Tensor:
        return (self.total / max(self.tokens, 1)).sqrt()


def block_shares(
    inventory: Inventory, batches: Sequence[Example], tokens: Sequence[Tensor | None], share: float, how: UnequalShares
) -> dict[str, float]:
    """The share that each block gives up.

    Args:
        inventory: of the original model.
        batches: to run it on.
        tokens: batch by batch, True = no padding; None = there is none.
        share: the mean of all, over weights.
        how: the rule.

    Returns:
        block -> share.

    Cost: one forward pass of the whole model per batch.
    """
    squares = _squares(inventory, batches, tokens)
    scores = {block: list(_scores(inventory, squares, block)) for stack in inventory.stacks for block in stack}
    sizes = {block: sum(score.numel() for score in found) for block, found in scores.items()}
    scores = {block: found for block, found in scores.items() if found}
    if how.name == "owl":
        return owl_shares(
            {block: outlier_share(found, how.outliers) for block, found in scores.items()}, sizes, share, how.limit
        )
    return curve_shares(
        {block: loss_curve(found, share - how.limit, share + how.limit) for block, found in scores.items()},
        sizes,
        share,
        how.limit,
    )


def outlier_share(scores: Sequence[Tensor], times: float) -> float:
    """Share of entries above so many times the mean of all."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > times * mean).sum()) for score in scores) / count


def owl_shares(outliers: Mapping[str, float], sizes: Mapping[str, int], share: float, limit: float) -> dict[str, float]:
    """Shares that fall with the outliers, over a range of twice the limit; their mean over weights is as given.

    Args:
        outliers: block -> share of outliers.
        sizes: block -> weights.
        share: the mean.
        limit: half of the range.

    Example:
        >>> owl_shares({"a": 0.1, "b": 0.3}, {"a": 1, "b": 1}, 0.5, 0.08)
        {'a': 0.58, 'b': 0.42}
    """
    low, high = min(outliers.values()), max(outliers.values())
    spread = {block: (one - low) / (high - low) if high > low else 0.0 for block, one in outliers.items()}
    total = sum(sizes[block] for block in spread)
    mean = sum(sizes[block] * one for block, one in spread.items()) / total
    # A range that would take more than there is, or less than nothing, is made narrower for all.
    width = min([2 * limit, *(_room(mean - one, share) for one in spread.values())])
    return {block: share + width * (mean - one) for block, one in spread.items()}


def _room(direction: float, share: float) -> float:
    """How far a share can go in a direction."""
    if direction == 0:
        return float("inf")
    return (MOST - share) / direction if direction > 0 else (LEAST - share) / direction


def loss_curve(scores: Sequence[Tensor], low: float, high: float) -> list[float]:
    """Squares of scores that are lost with growing shares, relative to all of a matrix, as a mean over matrices."""
    low, high = max(low, LEAST), min(high, MOST)
    curve = torch.zeros(STEPS + 1, dtype=torch.float64)
    for score in scores:
        sums = score.double().square().reshape(-1).sort().values.cumsum(0).cpu()
        places = (torch.linspace(low, high, STEPS + 1, dtype=torch.float64) * len(sums)).long()
        lost = torch.where(places > 0, sums[(places - 1).clamp(min=0)], torch.zeros((), dtype=torch.float64))
        curve += lost / sums[-1].clamp(min=1e-300)
    return [float(one) for one in curve / len(scores)]


def curve_shares(
    curves: Mapping[str, Sequence[float]], sizes: Mapping[str, int], share: float, limit: float
) -> dict[str, float]:
    """Shares for which the sum of all curves is least: steps are taken where they cost least per weight.

    Args:
        curves: block -> what is lost at equally many shares between the least and the largest, convex.
        sizes: block -> weights.
        share: the mean.
        limit: how far a share may be from it.
    """
    low, high = max(share - limit, LEAST), min(share + limit, MOST)
    step = (high - low) / STEPS
    found = dict.fromkeys(curves, low)
    left = (share - low) * sum(sizes[block] for block in curves)
    rises = sorted(
        ((curve[i + 1] - curve[i]) / sizes[block], i, block) for block, curve in curves.items() for i in range(STEPS)
    )
    for _, _, block in rises:
        taken = min(step, left / sizes[block])
        found[block] += taken
        left -= taken * sizes[block]
        if left <= 0:
            break
    return found


def _squares(
    inventory: Inventory, batches: Sequence[Example], tokens: Sequence[Tensor | None]
) -> dict[MatrixSite, _Squares]:
    found: dict[MatrixSite, _Squares] = {}
    for number, batch in enumerate(batches):

        def visit(use: Use, number: int = number) -> None:
            name, part = use.site
            for place in range(len(inventory.parameters[name])) if use.stacked else (part,):
                if (name, place) in inventory.matrices:
                    dtype = torch.promote_types(use.rows.dtype, torch.float32)
                    rows = rows_of(use, tokens[number], dtype, max(place, 0))
                    own = found.setdefault(
                        (name, place), _Squares(rows.new_zeros(rows.shape[1]), 0, use.turned, use.geometry is not None)
                    )
                    own.total += rows.square().sum(0)
                    own.tokens += len(rows)

        seen = {site[0]: inventory.parameters[site[0]] for site in inventory.matrices}
        with torch.no_grad(), Products(seen, visit):
            call(inventory.model, batch)
    return found


def _scores(inventory: Inventory, squares: Mapping[MatrixSite, _Squares], block: str) -> Iterator[Tensor]:
    names = set(inventory.solved_in(block))
    for site, matrix in inventory.matrices.items():
        if site[0] not in names or site not in squares:
            continue
        own = squares[site]
        if not own.geometry and own.turned != matrix.turned:
            matrix = replace(matrix, turned=own.turned, shape=matrix.shape[::-1])
        yield matrix.read(inventory.parameters[site[0]]).abs() * own.norms()


def site_shares(inventory: Inventory, blocks: Mapping[str, float], share: float) -> dict[MatrixSite, float]:
    """The share of every matrix: that of its block; blocks of which nothing is known give up the mean."""
    return {site: blocks.get(inventory.block_of(site[0]), share) for site in inventory.matrices}
