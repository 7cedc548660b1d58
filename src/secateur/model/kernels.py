"""Which kernels torch takes: switches of the process, put back on leaving.

Fused kernels are right, but some cannot be looked into (one call where the structure engine needs the dozen that it
stands for), and some have no second derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def unfused_attention() -> Iterator[None]:
    """nn.MultiheadAttention takes its slow path in eval mode too: the same calls as in training."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def unfused(*models: nn.Module) -> Iterator[None]:
    """Slow path of attention, and no oneDNN kernels for models with recurrent layers."""
    onednn = torch._C._get_mkldnn_enabled()  # the public switch warns about TF32 on some machines
    with unfused_attention():
        try:
            if has_recurrent(*models):
                torch._C._set_mkldnn_enabled(False)
            yield
        finally:
            torch._C._set_mkldnn_enabled(onednn)


@contextmanager
def exact_derivatives(model: nn.Module) -> Iterator[None]:
    """Kernels that have second derivatives and batching rules, in full float32, with gradients on.

    Attention runs on the math backend (the fused kernels have no double backward), the fused inference path
    of nn.MultiheadAttention is off, TF32 is off, and recurrent layers leave cuDNN.
    """
    cudnn = torch.backends.cudnn
    enabled, deterministic = cudnn.enabled, cudnn.deterministic
    with warnings.catch_warnings(), unfused_attention(), sdpa_kernel(SDPBackend.MATH), ieee(), torch.enable_grad():
        # Said by torch.func wherever a batching rule is a loop: known here, and nothing that the user could do.
        warnings.filterwarnings("ignore", message="There is a performance drop because")
        cudnn.enabled, cudnn.deterministic = enabled and not has_recurrent(model), True
        try:
            yield
        finally:
            cudnn.enabled, cudnn.deterministic = enabled, deterministic


@contextmanager
def ieee() -> Iterator[None]:
    """Products and convolutions of float32 in all of its bits, also on graphics processors (no TF32)."""
    # The older switch, allow_tf32, cannot even be read where the newer one was set.
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def has_recurrent(*models: nn.Module) -> bool:
    """Whether there are RNN, LSTM or GRU layers."""
    return any(isinstance(module, nn.RNNBase) for model in models for module in model.modules())
