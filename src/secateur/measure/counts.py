"""What can be counted without running the model: parameters, non-zeros, bytes of the weight file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.files.safe import save_tensors


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

    The file is really written, to a temporary folder, and its size read. Zeros are not compressed: a masked
    model has the size of the dense one.

    Returns:
        Bytes.

    Raises:
        InputError: a tensor cannot be stored, for example one on the meta device.
        ResourceError: the temporary folder has no room.
    """
    state = {n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    # Written and not added up: headers, alignment and ties are the file's business, and the figure is of the file.
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = Path(folder) / "model.safetensors"
        save_tensors(path, state)
        return path.stat().st_size


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({_identity(tensor): tensor for tensor in tensors}.values())


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Key that is equal for tensors that are the same memory seen the same way."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    # By memory and not by object: a tied weight may be reached through two Parameter objects.
    pointer = tensor.untyped_storage().data_ptr()
    if pointer == 0:
        return (id(tensor),)
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
