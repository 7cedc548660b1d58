"""Which kernels torch takes: switches of the process, put back on leaving.

Fused kernels are right, but some cannot be looked into (one call where the structure engine needs the dozen that it
stands for), and some have no second derivative.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.model.modules import modules_of


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
    """Slow path of attention, no oneDNN kernels for models with recurrent layers, and nothing that is compiled."""
    onednn = torch._C._get_mkldnn_enabled()  # the public switch warns about TF32 on some machines
    with unfused_attention(), uncompiled():
        try:
            if has_recurrent(*models):
                torch._C._set_mkldnn_enabled(False)
            yield
        finally:
            torch._C._set_mkldnn_enabled(onednn)


def uncompiled() -> AbstractContextManager[object]:
    """What `torch.compile` has made of parts of a model runs line by line: compiled code cannot be looked into."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def exact_derivatives(model: nn.Module) -> Iterator[None]:
    """Kernels that have second derivatives and batching rules, in full float32, with gradients on.

    Attention runs on the math backend (the fused kernels have no double backward), the fused inference path
    of nn.MultiheadAttention is off, TF32 is off, and recurrent layers leave cuDNN.
    """
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.flags(enabled=not has_recurrent(model), deterministic=True, allow_tf32=False)
    with warnings.catch_warnings(), unfused_attention(), sdpa_kernel(SDPBackend.MATH), cudnn, torch.enable_grad():
        # Said by torch.func wherever a batching rule is a loop: known here, and nothing that the user could do.
        warnings.filterwarnings("ignore", message="There is a performance drop because")
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul


def has_recurrent(*models: nn.Module) -> bool:
    """Whether there are RNN, LSTM or GRU layers."""
    return any(isinstance(module, nn.RNNBase) for model in models for module in modules_of(model))
