"""Hashes of models and tensors: names, types, shapes and values."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from secateur.model.tensors import named_tensors


def hash_model(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters and buffers; the memory format does not count.

    Cost: one pass over the weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        # Shapes and types too: without them other tensors of the same bytes would be the same model.
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor in logical order."""
    # Viewed as bytes, since numpy knows no bfloat16; in logical order, whatever the memory format.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return np.ascontiguousarray(flat.view(torch.uint8).numpy()).tobytes() if flat.numel() else b""
