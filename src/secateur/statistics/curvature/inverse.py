"""Damped inverses of a curvature matrix over many weights, in two forms, and what Optimal Brain Surgeon asks of them.

Legend: d weights in one flat vector, N gradients, b weights per block; G_Nd rows of gradients, lam the damping.

* `LowRank`: lam I + G^T G / N over all weights together, through an N x N matrix (Woodbury);
* `Blocks`: lam I + dense diagonal blocks.

Both answer the same questions: the diagonal of the inverse, the saliency of sets, the best update of what
survives. A set Q that is removed with its best update costs w_Q^T ([F^-1]_QQ)^-1 w_Q / 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.statistics.notes import note

BOUND = 1e3  # times the mean diagonal: damping is raised to this and no further
SOLVE_NUMBERS = 2**23
ROUNDING = 1e-14  # 1 - |V_q|^2 is positive; cancellation in float64 must not make it zero


def damped_cholesky(matrix: Tensor, damping: float, what: str, *, scale: float = 1.0) -> tuple[Tensor, float]:
    """Cholesky factor of ``matrix + damping * scale * I``; damping is raised tenfold while that fails.

    Args:
        matrix: [..., n, n], symmetric, without damping.
        damping: wanted damping, at least 0.
        what: name for messages.
        scale: factor of the damping on the diagonal.

    Returns:
        The lower factors and the damping used.

    Raises:
        InputError: it fails up to 1000 times the mean of the diagonal.

    Warns:
        CurvatureWarning: the damping was raised.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    size = float(matrix.diagonal(dim1=-2, dim2=-1).abs().mean()) / scale if matrix.numel() else 0.0
    used, limit = damping, max(BOUND * size, damping)
    while used <= limit:
        factor, info = torch.linalg.cholesky_ex(matrix + used * scale * identity)
        if not bool((info > 0).any()) and bool(torch.isfinite(factor).all()):
            if used != damping:
                note(f"{what} is not positive definite: damping was raised from {damping:.3g} to {used:.3g}")
            return factor, used
        used = max(10 * used, 1e-8 * size, 1e-30)
    raise InputError(
        f"{what} cannot be factorised, with damping up to {limit:.3g}",
        hint="check the data for NaN or Inf, or give a larger damping",
    )


class Curvature(ABC):
    """A damped curvature matrix over a flat vector of weights.

    Args:
        damping: what was added to the diagonal.
    """

    damping: float

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of the inverse: float64 [d]."""

    @abstractmethod
    def solve(self, vector_d: Tensor) -> Tensor:
        """The inverse times a vector: float64 [d]."""

    @abstractmethod
    def saliency(self, weights_d: Tensor, coordinates: Tensor, unit: Tensor, count: int) -> Tensor:
        """``w_Q^T ([F^-1]_QQ)^-1 w_Q / 2`` of many sets.

        Args:
            weights_d: the weights.
            coordinates: int64 [p], positions in the flat vector.
            unit: int64 [p], the set that each position belongs to; a position may be in several.
            count: number of sets.

        Returns:
            float64 [count].
        """

    @abstractmethod
    def remove(self, weights_d: Tensor, keep_d: Tensor) -> tuple[Tensor, float]:
        """Remove weights and update the others at least cost.

        Args:
            weights_d: the weights.
            keep_d: bool, True = stays.

        Returns:
            New weights, exactly 0.0 where removed, and the predicted rise of the loss.
        """


class LowRank(Curvature):
    """``lam I + G^T G / N`` by Woodbury: exact for this matrix, never d x d.

    Args:
        rows_Nd: gradients, one per row.
        damping: lam, above 0.
        gram_NN: ``G G^T`` where it is known already.

    Cost:
        N^2 d for the Gram matrix, N^2 d for the diagonal, N^3 for a removal; memory N d.

    Source:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        2021, section 3 (the same matrix by a recursion).
    """

    def __init__(self, rows_Nd: Tensor, damping: float, gram_NN: Tensor | None = None) -> None:
        self.rows_Nd = rows_Nd
        self.number = rows_Nd.shape[0]
        self.gram_NN = gram(rows_Nd) if gram_NN is None else gram_NN
        self.factor_NN, self.damping = damped_cholesky(
            self.gram_NN, damping, "the Gram matrix of the gradients", scale=self.number
        )

    def _columns(self, index: Tensor | slice) -> Tensor:
        return self.rows_Nd[:, index].to(torch.float64)

    def _whitened(self, index: Tensor | slice) -> Tensor:
        """V with V^T V = G^T (N lam I + G G^T)^-1 G on some columns."""
        found: Tensor = torch.linalg.solve_triangular(self.factor_NN, self._columns(index), upper=False)
        return found

    def inverse_diagonal(self) -> Tensor:
        """``(1 - sum of V squared) / lam``, by slices of columns."""
        parts = [(1 - self._whitened(s).square().sum(0)).clamp(min=ROUNDING) for s in _slices(self.rows_Nd)]
        return torch.cat(parts) / self.damping

    def solve(self, vector_d: Tensor) -> Tensor:
        """The inverse times a vector."""
        inner = torch.cholesky_solve(_times(self.rows_Nd, vector_d)[:, None], self.factor_NN)[:, 0]
        return (vector_d.to(torch.float64) - _transposed_times(self.rows_Nd, inner)) / self.damping

    def saliency(self, weights_d: Tensor, coordinates: Tensor, unit: Tensor, count: int) -> Tensor:
        """By |Q| x |Q| systems, or N x N where the set is larger than the number of gradients."""
        total = torch.zeros(count, dtype=torch.float64, device=weights_d.device)
        for which, index in _equal_sets(coordinates, unit, torch.zeros_like(unit)):
            size = index.shape[1]
            step = max(1, SOLVE_NUMBERS // max(self.number * size, min(size, self.number) ** 2))
            for some, place in zip(torch.split(which, step), torch.split(index, step), strict=True):
                total.index_add_(0, some, self._saliency(weights_d[place].to(torch.float64), place))
        return total

    def _saliency(self, weights_uk: Tensor, index_uk: Tensor) -> Tensor:
        number, size = self.number, index_uk.shape[1]
        if size == 1:
            left = (1 - self._whitened(index_uk[:, 0]).square().sum(0)).clamp(min=ROUNDING)
            found: Tensor = self.damping * weights_uk[:, 0].square() / (2 * left)
            return found
        if size <= number:
            white = self._whitened(index_uk.flatten()).view(number, -1, size).movedim(0, 1)
            system = torch.eye(size, dtype=torch.float64, device=white.device) - white.mT @ white
            answer = torch.linalg.solve(system, weights_uk[..., None])[..., 0]
            cost: Tensor = self.damping * (weights_uk * answer).sum(1) / 2
            return cost
        # What is left of the curvature without the set: N lam I + G G^T - G_Q G_Q^T is better conditioned.
        costs = []
        for weights_k, index_k in zip(weights_uk, index_uk, strict=True):
            columns = self._columns(index_k)
            costs.append(self._without(columns @ weights_k, columns @ columns.T, weights_k)[1])
        return torch.stack(costs)

    def _without(self, pull_N: Tensor, gone_NN: Tensor, weights_k: Tensor) -> tuple[Tensor, Tensor]:
        """K_P^-1 b and the cost, for the survivors P: lam (|w_Q|^2 + b^T K_P^-1 b) / 2 with b = G_Q w_Q."""
        factor, damping = damped_cholesky(
            self.gram_NN - gone_NN, self.damping, "the Gram matrix of the survivors", scale=self.number
        )
        answer = torch.cholesky_solve(pull_N[:, None], factor)[:, 0]
        return answer, damping * (weights_k.square().sum() + pull_N @ answer) / 2

    def remove(self, weights_d: Tensor, keep_d: Tensor) -> tuple[Tensor, float]:
        """Survivors move by G_P^T (N lam I + G_P G_P^T)^-1 G_Q w_Q."""
        weights = weights_d.to(torch.float64)
        gone = weights * ~keep_d
        pull = _times(self.rows_Nd, gone)
        answer, cost = self._without(pull, gram(self.rows_Nd, ~keep_d), gone)
        moved = weights + _transposed_times(self.rows_Nd, answer)
        return torch.where(keep_d, moved, torch.zeros_like(moved)), float(cost)


class Blocks(Curvature):
    """``lam I`` plus dense blocks on the diagonal: weights of different blocks do not interact.

    Args:
        blocks: symmetric float64 matrices in the order of the flat vector, undamped.
        damping: lam, at least 0.

    Cost:
        d b^2 for the inverses; memory d b.

    Source:
        Singh, Alistarh, "WoodFisher", 2020, section 3 (blocks); Hassibi, Stork, "Second order derivatives for
        network pruning: Optimal Brain Surgeon", 1992, equation 5.
    """

    def __init__(self, blocks: list[Tensor], damping: float) -> None:
        width = max(len(block) for block in blocks)
        device = blocks[0].device
        self.sizes = torch.tensor([len(block) for block in blocks], device=device)
        self.matrix = torch.zeros(len(blocks), width, width, dtype=torch.float64, device=device)
        self.matrix.diagonal(dim1=1, dim2=2).fill_(1.0)  # rows beyond a short block stay an identity
        for padded, block in zip(self.matrix, blocks, strict=True):
            padded[: len(block), : len(block)] = block
        self.block = torch.repeat_interleave(torch.arange(len(blocks), device=device), self.sizes)
        starts = self.sizes.cumsum(0) - self.sizes
        self.place = torch.arange(int(self.sizes.sum()), device=device) - starts[self.block]
        factor, self.damping = damped_cholesky(self.matrix, damping, "a curvature block")
        self.matrix.diagonal(dim1=1, dim2=2).add_(self.damping)
        self.inverse = torch.cholesky_inverse(factor)

    def inverse_diagonal(self) -> Tensor:
        """Read off the blocks' inverses."""
        return self.inverse[self.block, self.place, self.place]

    def _spread(self, vector_d: Tensor) -> Tensor:
        spread = torch.zeros(self.matrix.shape[:2], dtype=torch.float64, device=self.matrix.device)
        spread[self.block, self.place] = vector_d.to(torch.float64)
        return spread

    def solve(self, vector_d: Tensor) -> Tensor:
        """The inverse times a vector."""
        return (self.inverse @ self._spread(vector_d)[..., None])[self.block, self.place, 0]

    def saliency(self, weights_d: Tensor, coordinates: Tensor, unit: Tensor, count: int) -> Tensor:
        """The parts of a set in different blocks add up."""
        total = torch.zeros(count, dtype=torch.float64, device=weights_d.device)
        for which, index in _equal_sets(coordinates, unit, self.block[coordinates]):
            step = max(1, SOLVE_NUMBERS // index.shape[1] ** 2)
            for some, coordinate in zip(torch.split(which, step), torch.split(index, step), strict=True):
                place, block = self.place[coordinate], self.block[coordinate[:, 0]]
                part = self.inverse[block[:, None, None], place[:, :, None], place[:, None, :]]
                w = weights_d[coordinate].to(torch.float64)
                answer = torch.linalg.solve(part, w[..., None])[..., 0]
                total.index_add_(0, some, (w * answer).sum(1) / 2)
        return total

    def remove(self, weights_d: Tensor, keep_d: Tensor) -> tuple[Tensor, float]:
        """Survivors of a block solve F_PP delta = F_PQ w_Q."""
        weights = weights_d.to(torch.float64)
        stays = self._spread(keep_d.to(torch.float64))
        gone = self._spread(weights * ~keep_d)
        pull = (self.matrix @ gone[..., None])[..., 0]
        # Rows of removed weights become those of an identity: blocks lose different numbers, and all are solved
        # together.
        system = self.matrix * stays[:, :, None] * stays[:, None, :] + torch.diag_embed(1 - stays)
        delta = torch.linalg.solve(system, (pull * stays)[..., None])[..., 0] * stays
        cost = ((gone * pull).sum() - (delta * pull).sum()) / 2
        moved = weights + delta[self.block, self.place]
        return torch.where(keep_d, moved, torch.zeros_like(moved)), float(cost)


def gram(rows_Nd: Tensor, columns: Tensor | None = None) -> Tensor:
    """``G G^T`` in float64, by slices of columns; only some columns where a bool mask is given."""
    total = torch.zeros(len(rows_Nd), len(rows_Nd), dtype=torch.float64, device=rows_Nd.device)
    for some in _slices(rows_Nd):
        part = rows_Nd[:, some].to(torch.float64)
        part = part if columns is None else part[:, columns[some]]
        total += part @ part.T
    return total


def _slices(rows_Nd: Tensor) -> Iterator[slice]:
    step = max(1, SOLVE_NUMBERS // max(len(rows_Nd), 1))
    for start in range(0, rows_Nd.shape[1], step):
        yield slice(start, start + step)


def _times(rows_Nd: Tensor, vector_d: Tensor) -> Tensor:
    parts = (rows_Nd[:, s].to(torch.float64) @ vector_d[s].to(torch.float64) for s in _slices(rows_Nd))
    return sum(parts, torch.zeros(len(rows_Nd), dtype=torch.float64, device=rows_Nd.device))


def _transposed_times(rows_Nd: Tensor, vector_N: Tensor) -> Tensor:
    return torch.cat([rows_Nd[:, s].to(torch.float64).T @ vector_N for s in _slices(rows_Nd)])


# Units of one size share a batched solve: one by one they would take longer than the algebra itself.
def _equal_sets(coordinates: Tensor, unit: Tensor, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of units within blocks, those of equal size together: unit numbers [u], coordinates [u, size]."""
    key = unit * (int(block.max()) + 1 if len(block) else 1) + block
    order = torch.argsort(key, stable=True)
    _, sizes = torch.unique_consecutive(key[order], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    for size in torch.unique(sizes).tolist():
        begin = starts[sizes == size]
        index = order[begin[:, None] + torch.arange(size, device=begin.device)]
        yield unit[index[:, 0]], coordinates[index]
