"""Which masks a layer may have: free in the layer or in each row, n of m, or blocks; always to the exact count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import RecipeError
from secateur.kinds.weights.nm import keep_pattern

Scores = NDArray[np.generic]
SAMPLED, ENOUGH = 5, 100  # one entry of so many is looked at, where that leaves so many of a row
WORTH_THREADS = 1 << 17  # numbers below which starting threads takes longer than they save


class Pattern(ABC):
    """Chooses which entries of a matrix of scores stay."""

    @abstractmethod
    def keep(self, score: Tensor, share: float = 1.0) -> Tensor:
        """The mask of the highest scores.

        Args:
            score: [o, d], higher = keep.
            share: of the removals that are made already, for schedules; patterns without steps in between take all.

        Returns:
            bool [o, d], True = keep. Of equal scores the later one stays.
        """

    def nearly(self, score: Tensor, share: float = 1.0) -> Tensor:
        """As `keep`, but the count may be missed by a little: for steps whose mask is not the result."""
        return self.keep(score, share)

    @abstractmethod
    def removed(self, shape: tuple[int, int]) -> int:
        """How many entries of a matrix go."""


@dataclass(frozen=True)
class PerLayer(Pattern):
    """The lowest scores of the whole layer go.

    Args:
        count: entries that go.
    """

    count: int

    def keep(self, score: Tensor, share: float = 1.0) -> Tensor:
        """See `Pattern.keep`."""
        flat = score.reshape(1, -1)
        return highest(flat, torch.tensor([round(self.count * share)])).reshape(score.shape)

    def nearly(self, score: Tensor, share: float = 1.0) -> Tensor:
        """See `Pattern.nearly`."""
        return about_highest(score.reshape(1, -1), self.count * share).reshape(score.shape)

    def removed(self, shape: tuple[int, int]) -> int:
        """See `Pattern.removed`."""
        return self.count


@dataclass(frozen=True)
class PerRow(Pattern):
    """The lowest scores of every row go, from each row equally many up to one.

    Args:
        count: entries that go from the whole layer.
    """

    count: int

    def keep(self, score: Tensor, share: float = 1.0) -> Tensor:
        """See `Pattern.keep`."""
        return highest(score, self.counts(len(score), share))

    def nearly(self, score: Tensor, share: float = 1.0) -> Tensor:
        """See `Pattern.nearly`."""
        return about_highest(score, self.count * share / len(score))

    def counts(self, rows: int, share: float = 1.0) -> Tensor:
        """Entries that go from each row: the whole count is met exactly, rows with one more lie evenly spread."""
        edges = torch.arange(rows + 1) * round(self.count * share) // rows
        return edges.diff()

    def removed(self, shape: tuple[int, int]) -> int:
        """See `Pattern.removed`."""
        return self.count


@dataclass(frozen=True)
class NofM(Pattern):
    """n of each m neighbours along the inputs stay; what m does not divide stays whole.

    Args:
        n: kept of each m.
        m: length of a run.
    """

    n: int
    m: int

    def keep(self, score: Tensor, share: float = 1.0) -> Tensor:
        """See `Pattern.keep`. Groups are small, so there are no steps in between."""
        return keep_pattern(score, self.n, self.m)

    def removed(self, shape: tuple[int, int]) -> int:
        """See `Pattern.removed`."""
        return shape[0] * (shape[1] // self.m) * (self.m - self.n)


@dataclass(frozen=True)
class BlockPattern(Pattern):
    """Whole blocks of r outputs times c inputs go, those with the least mean score.

    Args:
        rows: r.
        columns: c.
        count: blocks that go.
    """

    rows: int
    columns: int
    count: int

    def keep(self, score: Tensor, share: float = 1.0) -> Tensor:
        """See `Pattern.keep`."""
        r, c = (torch.arange(n, device=score.device) // k for n, k in zip(score.shape, self._sizes, strict=True))
        across = int(c[-1]) + 1
        block = r[:, None] * across + c
        size = (int(r[-1]) + 1) * across
        sums = score.new_zeros(size).index_add_(0, block.reshape(-1), score.reshape(-1))
        # Blocks at the edges are smaller: a sum would call them worthless.
        mean = sums / torch.bincount(block.reshape(-1), minlength=size)
        return highest(mean[None], torch.tensor([round(self.count * share)]))[0][block]

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.rows, self.columns

    def removed(self, shape: tuple[int, int]) -> int:
        """Not told: blocks at the edges are smaller, and which of them go is for the scores to say.

        Raises:
            RecipeError: the shape is not a multiple of the block.
        """
        if shape[0] % self.rows or shape[1] % self.columns:
            raise RecipeError(f"blocks of {self.rows} x {self.columns} do not divide a weight of {shape}")
        return self.count * self.rows * self.columns


@dataclass(frozen=True, eq=False)
class Fixed(Pattern):
    """A mask that is there already.

    Args:
        mask: bool [o, d], True = keep.
    """

    mask: Tensor

    def keep(self, score: Tensor, share: float = 1.0) -> Tensor:
        """See `Pattern.keep`."""
        return self.mask

    def removed(self, shape: tuple[int, int]) -> int:
        """See `Pattern.removed`."""
        return int((~self.mask).sum())


def highest(score: Tensor, drop: Tensor) -> Tensor:
    """Mask of all but the `drop[i]` lowest entries of each row; of equal ones the later stays.

    Args:
        score: [rows, n].
        drop: int64 [rows].

    Returns:
        bool [rows, n], exactly `drop` False in each row.

    Example:
        >>> highest(torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([1]))
        tensor([[ True, False,  True]])
    """
    counts = sorted(set(drop.tolist()))
    drop = drop.to(score.device)
    edge = _order_statistic(score, drop, counts)
    keep = score > edge[:, None]
    # With no two scores alike around the edge, all is said; else as many of the equal ones stay as the count asks for.
    extra = score.shape[1] - drop - keep.sum(1)
    rows = extra.nonzero().flatten()
    if len(rows):
        tied = score[rows] == edge[rows, None]
        behind = tied.flip(1).cumsum(1).flip(1)
        keep[rows] |= tied & (behind <= extra[rows, None])
    return keep


def about_highest(score: Tensor, drop: float) -> Tensor:
    """Mask of about all but the `drop` lowest entries of each row: every fifth one says where the edge lies.

    Rows too short to be told by a fifth of them are looked at whole. An interval of five is no divisor of the usual
    kernels and heads, whose entries would else all be of one kind.

    Args:
        score: [rows, n].
        drop: entries that go from each row.
    """
    part = score[:, ::SAMPLED] if score.shape[1] >= SAMPLED * ENOUGH else score
    count = min(round(drop * part.shape[1] / score.shape[1]), part.shape[1])
    return score > _order_statistic(part, torch.full((len(part),), count, device=score.device), [count])[:, None]


def _order_statistic(score: Tensor, drop: Tensor, counts: list[int]) -> Tensor:
    """The drop-th lowest entry of each row; below all entries where nothing is dropped. `counts` are those of drop."""
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64) and counts[-1] - counts[0] < 2:
        return _selected(score, drop, counts[0])
    if score.device.type != "cpu":
        # One sort of all rows: selection on a graphics processor takes one of its many parts per row.
        return _sorted(score, drop)
    edge = torch.empty(len(score), dtype=score.dtype, device=score.device)
    for count in counts:
        rows = (drop == count).nonzero().flatten()
        edge[rows] = -torch.inf if count == 0 else score[rows].kthvalue(count, dim=1).values
    return edge


def _sorted(score: Tensor, drop: Tensor) -> Tensor:
    """As `_order_statistic`, by a sort."""
    found = score.sort(dim=1).values.gather(1, (drop - 1).clamp(min=0)[:, None])[:, 0]
    return found.masked_fill(drop == 0, -torch.inf)


def _selected(score: Tensor, drop: Tensor, least: int) -> Tensor:
    """As `_order_statistic`, where rows drop `least` or one more: by selection, where torch sorts."""
    found, more = score.detach().numpy(), (drop > least).numpy()
    threads = min(torch.get_num_threads(), len(found)) if found.size >= WORTH_THREADS else 1
    if threads < 2:
        return torch.from_numpy(_selected_rows(found, more, least))
    # NumPy selects on one core, but lets others work meanwhile. Rows do not depend on each other.
    parts = np.array_split(found, threads), np.array_split(more, threads)
    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(_selected_rows, *parts, [least] * threads))
    return torch.from_numpy(np.concatenate(done))


def _selected_rows(found: Scores, more: Scores, least: int) -> Scores:
    """The `least`-th lowest entry of each row, or the next one where `more` says so."""
    lower = np.full(len(found), -np.inf, dtype=found.dtype)
    if least:
        found = np.partition(found, least - 1, axis=1)
        lower = found[:, least - 1]
    if not more.any():
        return lower.copy()
    # What lies behind the place of a selection is not sorted, but none of it is smaller.
    return np.where(more, found[:, least:].min(axis=1), lower)
