"""Sums over tokens of what the products of one weight read, in the pruned and in the original model.

Legend: X inputs in the original model, X~ those behind pruned blocks, both [tokens, d] here. H = X~^T X~ and
C = (X - X~)^T X~ are summed for the tokens that solvers may see and for those that are held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.model.padding import without_padding
from secateur.solve.blocks.products import Use

PANEL = 192  # columns per product: the lower triangle of H is copied from the upper one, but for squares of this size


@dataclass(eq=False)
class GramSums:
    """Sums over some tokens.

    Args:
        gram: X~^T X~, [d, d]; of a diagonal sum the diagonal alone is filled.
        cross: (X - X~)^T X~, [d, d], where the original's inputs are known.
        tokens: rows so far.
    """

    gram: Tensor
    cross: Tensor | None = None
    tokens: int = 0

    def mean(self) -> Tensor:
        """H per token."""
        return self.gram / max(self.tokens, 1)

    def mean_cross(self) -> Tensor | None:
        """C per token."""
        return None if self.cross is None else self.cross / max(self.tokens, 1)

    def merge(self, other: GramSums) -> GramSums:
        """Both together; what only one of them knows is left out."""
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        return GramSums(self.gram + other.gram, cross, self.tokens + other.tokens)


def empty(width: int, like: Tensor, *, cross: bool) -> GramSums:
    """Sums of nothing."""
    zeros = torch.zeros(width, width, dtype=like.dtype, device=like.device)
    return GramSums(zeros, zeros.clone() if cross else None)


def add(sums: GramSums, rows: Tensor, dense: Tensor | None, *, full: bool) -> None:
    """Take in the rows of one batch.

    Args:
        sums: changed in place.
        rows: X~, [tokens, d].
        dense: X at the same tokens.
        full: whether all of H is wanted, or its diagonal.
    """
    if not full:
        sums.gram.diagonal().add_((rows * rows).sum(0))
    else:
        width = rows.shape[1]
        for start in range(0, width, PANEL):
            stop = min(start + PANEL, width)
            # Half of a symmetric product is enough.
            part = rows[:, start:stop].T @ rows[:, start:]
            sums.gram[start:stop, start:] += part
            sums.gram[stop:, start:stop] += part[:, stop - start :].T
    if sums.cross is not None and dense is not None:
        sums.cross += (dense - rows).T @ rows
    sums.tokens += len(rows)


def rows_of(use: Use, tokens: Tensor | None, dtype: torch.dtype, part: int = 0) -> Tensor:
    """What a product multiplies, as [tokens, d] without padding.

    Args:
        use: the product.
        tokens: bool [batch, tokens], True = no padding; None: there is none.
        dtype: to compute in.
        part: of a stack that is multiplied at once.
    """
    value = use.rows
    if use.geometry is not None:
        # Columns by position first and channel last: runs of n:m lie along the channels.
        windows = use.geometry.rows(value)[0].to(dtype)
        places = 1
        for size in use.geometry.kernel:
            places *= size
        return windows.reshape(len(windows), -1, places).transpose(1, 2).reshape(len(windows), -1)
    if use.stacked:
        value = value[part] if value.dim() > 2 and value.shape[0] > part else value
    return without_padding(value, tokens).reshape(-1, value.shape[-1]).to(dtype)
