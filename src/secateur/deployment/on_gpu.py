"""Products with packed weights on a GPU: a Triton kernel for a few inputs, where Triton is installed.

Everything else (more inputs, other formats, no Triton) is unpacked on the GPU and multiplied dense.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from secateur.deployment.formats import Bitmask, Format

# Inputs at once that the kernel takes. It reads its weights once for each; a dense product reads them once for all.
MOST = 8
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def why_not() -> str:
    """Why there is no kernel for a GPU, in words; "" where there is one."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'secateur[gpu]'"
    return ""


def is_gpu(device: torch.device) -> bool:
    """Whether products on this device are those of this file."""
    return device.type == "cuda"


def described(device: torch.device) -> str:
    """The GPU, and what its kernels are made with: "NVIDIA H100, CUDA 13.0, Triton 3.7.1"."""
    triton = "no Triton" if why_not() else f"Triton {metadata.version('triton')}"
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {triton}"


def problem(layout: Format, dtype: torch.dtype, x: torch.dtype) -> str:
    """Why the kernel does not take weights of this format and dtype with such inputs, in words; "" where it does."""
    if not isinstance(layout, Bitmask):
        return f"no kernel for a GPU reads the format {layout.name!r}"
    if dtype not in _WEIGHTS or x not in _INPUTS:
        return f"no kernel for a GPU takes weights of {dtype} with inputs of {x}"
    return why_not()


def takes(layout: Format, dtype: torch.dtype, x: torch.dtype, device: torch.device, inputs: int) -> bool:
    """Whether the kernel is there for weights and inputs of these dtypes, for so many inputs on this device."""
    return is_gpu(device) and 0 < inputs <= MOST and not problem(layout, dtype, x)


def linear(
    x: Tensor, parts: Sequence[Tensor], scale: Tensor | None, bias: Tensor | None, rows: int, columns: int
) -> Tensor:
    """``x W^T * scale + bias`` by the kernel, where `takes` said so. Sums are of float32.

    Args:
        x: (..., columns).
        parts: what `Bitmask` packed, and nothing else: offsets are followed without looking. On the device of x.
        scale: per row, or None.
        bias: per row, or None.
        rows: outputs.
        columns: inputs.

    Returns:
        (..., rows), of the dtype of x.

    Cost: the first call with new dtypes compiles the kernel. Weights are read once per input.
    """
    from secateur.deployment.triton_bitmask import HEIGHT, PANEL, STEP, TOGETHER, WARPS

    flat = x.reshape(-1, columns).contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    values, masks, offsets = (part.contiguous() for part in parts)
    words = masks.view(torch.int16)  # bits of sixteen columns, the first in the lowest
    scale, bias = (None if each is None else each.detach().contiguous() for each in (scale, bias))
    programs = (len(offsets) - 1) * len(flat)
    if programs:
        # Triton starts kernels on the current device, wherever the tensors are.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            PANEL[(programs,)](
                y, flat, values, words, offsets, values if scale is None else scale, values if bias is None else bias,
                rows, columns, -(-columns // STEP), len(flat), SCALED=scale is not None, BIASED=bias is not None,
                HEIGHT=HEIGHT, STEP=STEP, TOGETHER=TOGETHER, num_warps=WARPS,
            )  # fmt: skip
    return y


@cache
def warn_once(why: str) -> None:
    """Say once per reason that products on the GPU are slow."""
    warnings.warn(
        f"weights are unpacked at every product on the GPU, which is slow: {why}; or call densify()", stacklevel=2
    )
