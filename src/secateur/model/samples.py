"""How many samples an example holds, and the same example with another number of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from secateur.errors import InputError
from secateur.model.call import describe, tensors_in
from secateur.model.forms import map_tensors
from secateur.types import Example


def batch_size_of(example: Example) -> int:
    """Size of the first dimension of the first tensor that has one; 1 where there is none."""
    return next((tensor.shape[0] for tensor in tensors_in(example) if tensor.dim()), 1)


def with_batch_size(example: Example, size: int) -> Example:
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

    return map_rows(example, now, lambda tensor: tensor[(torch.arange(size) % now).to(tensor.device)])


def pick_sample(example: Example, number: int) -> Example:
    """One sample of an example, as a batch of one.

    Args:
        example: what `call` takes.
        number: of the sample, from 0.

    Example:
        >>> pick_sample((torch.arange(6).view(3, 2), torch.zeros(7)), 2)
        (tensor([[4, 5]]), tensor([0., 0., 0., 0., 0., 0., 0.]))
    """
    return map_rows(example, batch_size_of(example), lambda tensor: tensor[[number]])


def map_rows(value: Example, size: int, take: Callable[[Tensor], Tensor]) -> Example:
    """An example or batch with every tensor changed that leads with the samples.

    Masks over positions and the like stay whole, and so do packed sequences: what they hold belongs together, and is
    no batch of rows.

    Args:
        value: the example or batch.
        size: number of its samples.
        take: gives the new tensor.
    """

    def change(tensor: Tensor) -> Tensor:
        return take(tensor) if tensor.dim() and tensor.shape[0] == size else tensor

    return map_tensors(value, change, whole=PackedSequence)
