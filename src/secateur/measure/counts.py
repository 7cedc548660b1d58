"""What can be counted without running the model: parameters, non-zeros, bytes of the weight file."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.files.safe import size_of


def num_params(model: nn.Module) -> int:
    """Number of parameters, tied ones once; buffers are not parameters.

    Example:
        >>> num_params(nn.Linear(3, 4))
        16
    """
    return sum(parameter.numel() for parameter in _unique(model.parameters()))


def num_nonzero(model: nn.Module) -> int:
    """Number of parameters that are not zero, tied ones once; says nothing about speed or file size.

    Cost: one pass over the weights.

    Example:
        >>> _ = torch.nn.init.zeros_((layer := nn.Linear(3, 4)).bias)
        >>> num_nonzero(layer) <= 12
        True
    """
    return sum(int(torch.count_nonzero(parameter.detach())) for parameter in _unique(model.parameters()))


def size_bytes(model: nn.Module) -> int:
    """Bytes of the model's state (parameters and persistent buffers, tied ones once) as a safetensors file.

    Zeros are not compressed: a masked model has the size of the dense one.

    Args:
        model: any module whose tensors have values.

    Returns:
        Bytes, exactly those of the file that `Result.save` writes.

    Raises:
        InputError: a tensor cannot be stored, for example one on the meta device.

    Cost: none to speak of; nothing is written and no weight is read.

    Example:
        >>> size_bytes(nn.Linear(3, 4)) > 16 * 4
        True
    """
    # Modules may put other things than tensors into their state (`get_extra_state`), which no weight file holds.
    return size_of({n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)})


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({_identity(tensor): tensor for tensor in tensors}.values())


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Key that is equal for tensors that are the same memory seen the same way.

    A storage can be shared without a tie: pieces of one buffer, or a weight and its transpose, are tensors of their
    own.
    """
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    # By memory and not by object: a tied weight may be reached through two Parameter objects.
    # Subclasses that wrap other tensors have no memory of their own: address 0 for all of them.
    pointer = tensor.untyped_storage().data_ptr()
    if pointer == 0:
        return (id(tensor),)
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
