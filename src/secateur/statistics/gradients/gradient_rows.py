"""Gradients of samples spread evenly over the data as the rows of a matrix, and samples held out from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.model import call
from secateur.model.room import require_room
from secateur.statistics.gradients.functional import CountedBatch, batches, parameters, samples_of
from secateur.statistics.gradients.per_sample import iterate_per_sample_gradients
from secateur.types import Data, Loss


@dataclass(frozen=True, eq=False)
class GradientRows:
    """Per-sample gradients over a flat vector of weights.

    Args:
        rows_Nd: one gradient per row, in the dtype of the parameters (at least float32).
        held_out: (batch, samples) pairs that gave no row, for checks.
    """

    rows_Nd: Tensor
    held_out: tuple[CountedBatch, ...]


def gradient_rows(
    model: nn.Module, loss: Loss, data: Data, names: Sequence[str], *, rows: int, held: int
) -> GradientRows:
    """Gradients of evenly spaced samples, so that data sorted by class is no trap.

    Args:
        model: any module, in eval mode.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        data: batches that can be read twice: once to count the samples, once for the gradients.
        names: parameters, in the order of the columns.
        rows: how many gradients, fewer where there are not so many samples.
        held: how many samples to hold out; at most a fifth of what there is.

    Returns:
        The rows and the samples held out.

    Raises:
        InputError: the data cannot be read twice or is empty.
        ResourceError: the rows need more memory than is free.

    Cost:
        One backward pass per row; rows x weights numbers.
    """
    call.require_reiterable(data, "choosing samples evenly")
    total = sum(size for _, size in batches(model, data))
    wanted = min(rows + held, total)
    like = parameters(model, names).values()
    # Twice: the rows of the samples, and all of them as one matrix.
    hint = "take fewer gradients (gradients=), score fewer layers (protect), or take criterion fisher"
    room = 2 * min(rows, wanted) * sum(tensor.numel() * tensor.element_size() for tensor in like)
    require_room(f"{min(rows, wanted)} gradients of single samples", room, call.device_of(model), hint=hint)
    chosen = torch.linspace(0, total - 1, wanted, dtype=torch.float64).round().long()
    apart = min(held, wanted // 5)
    aside = torch.zeros(wanted, dtype=torch.bool)
    if apart:
        aside[torch.linspace(0, wanted - 1, apart, dtype=torch.float64).round().long()] = True
    parts: list[Tensor] = []
    kept: list[CountedBatch] = []
    start = 0
    for batch, size in batches(model, data):
        here = (chosen >= start) & (chosen < start + size)
        for index, is_row in ((chosen[here & ~aside] - start, True), (chosen[here & aside] - start, False)):
            if len(index) and is_row:
                part = samples_of(batch, size, index.tolist())
                parts += [
                    torch.cat([found[name].flatten(1) for name in names], 1)
                    for found in iterate_per_sample_gradients(model, loss, part, names)
                ]
            elif len(index):
                kept.append((samples_of(batch, size, index.tolist()), len(index)))
        start += size
    rows_Nd = torch.cat(parts)
    wide = rows_Nd if rows_Nd.dtype == torch.float64 else rows_Nd.to(torch.float32)
    return GradientRows(wide, tuple(kept))


def flatten(tensors: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """Named tensors as one vector, in the order of the names."""
    return torch.cat([tensors[name].reshape(-1) for name in names])


def unflatten(vector_d: Tensor, model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The vector as named tensors of the parameters' shapes and dtypes."""
    found, start = {}, 0
    for name, like in parameters(model, names).items():
        part = vector_d[start : start + like.numel()]
        found[name] = part.view(like.shape).to(like.dtype)
        start += like.numel()
    return found
