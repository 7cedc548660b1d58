"""How many samples an example holds, and the same example with another number of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.model.call import describe, tensors_in
from secateur.types import Example


def batch_size_of(example: Example) -> int:
    """Size of the first dimension of the first tensor that has one; 1 where there is none."""
    return next((tensor.shape[0] for tensor in tensors_in(example) if tensor.dim()), 1)


def with_batch_size(example: Example, size: int) -> Any:
    """Repeat or trim every tensor whose first dimension is the batch to another batch size.

    Args:
        example: what `call` takes.
        size: wanted batch size, at least 1.

    Raises:
        InputError: size below 1, or an empty batch.
    """
    now = batch_size_of(example)
    if size < 1 or now < 1:
        raise InputError(f"cannot bring the example {describe(example)} to batch size {size}")

    return _rows(example, now, torch.arange(size) % now)


def pick_sample(example: Example, number: int) -> Example:
    """One sample of an example, as a batch of one.

    Args:
        example: what `call` takes.
        number: of the sample, from 0.

    Example:
        >>> pick_sample((torch.arange(6).view(3, 2), torch.zeros(7)), 2)
        (tensor([[4, 5]]), tensor([0., 0., 0., 0., 0., 0., 0.]))
    """
    return _rows(example, batch_size_of(example), torch.tensor([number]))


def _rows(value: Any, batch: int, rows: Tensor) -> Any:
    """Choose rows of every tensor that leads with the batch; masks over positions and the like stay whole."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
        return value[rows.to(value.device)]
    if isinstance(value, Mapping):
        return {key: _rows(item, batch, rows) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_rows(item, batch, rows) for item in value)
    return value
