"""Exact histograms of tensors of any size, and how much of a tensor is nearly zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from secateur.errors import InputError, NonFiniteError, RecipeError
from secateur.report.record import Histogram

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 22
_LARGEST = float(np.finfo(np.float64).max)
NEAR_ZERO = 1e-2


def histogram(tensor: Tensor, bins: int = 40) -> Histogram:
    """Count the elements of a tensor in bins of equal width between its minimum and maximum.

    Every element falls into exactly one bin, so the counts add up to ``tensor.numel()``. A bin holds its left
    edge, the last one its right edge too, as in numpy. A heavy tail leaves most elements in one bin: read
    such a histogram on a logarithmic count axis.

    Args:
        tensor: any shape, real dtype, any device. Constant tensors get edges around the value, empty ones
            get [0, 1].
        bins: number of bins, at least 1.

    Returns:
        ``bins + 1`` edges and ``bins`` counts.

    Raises:
        RecipeError: bins < 1.
        InputError: the tensor is complex.
        NonFiniteError: the tensor holds NaN or Inf.

    Cost:
        Two passes over the data in float64 chunks of 4 million elements; memory does not grow further.

    Example:
        >>> import torch
        >>> histogram(torch.tensor([0.0, 1.0, 1.0, 4.0]), bins=2).counts
        (3, 1)
    """
    import torch

    if bins < 1:
        raise RecipeError(f"a histogram needs at least one bin, not {bins}")
    low, high = _range(tensor)
    edges = _edges(low, high, bins)
    inner = torch.from_numpy(edges[1:-1].copy())
    counts = torch.zeros(bins, dtype=torch.int64)
    for chunk in _chunks(tensor):
        counts += torch.bincount(torch.bucketize(chunk, inner, right=True), minlength=bins)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def near_zero(tensor: Tensor, *, fraction: float = NEAR_ZERO) -> float:
    """Tell which share of the elements is smaller in magnitude than a fraction of their root mean square.

    Args:
        tensor: any shape, real dtype.
        fraction: of the root mean square, 0.01 by default.

    Returns:
        A share in [0, 1]; 1 for a tensor of zeros, 0 for an empty one.

    Raises:
        InputError: the tensor is complex.
        NonFiniteError: the tensor holds NaN or Inf.

    Cost:
        Three passes over the data, chunked.

    Example:
        >>> import torch
        >>> near_zero(torch.tensor([1.0, -1.0, 0.001, 0.0]))
        0.5
    """
    low, high = _range(tensor)
    largest = max(abs(low), abs(high))
    if tensor.numel() == 0 or largest == 0:
        return float(tensor.numel() > 0)
    # Dividing by the largest magnitude keeps the squares of huge and tiny weights inside float64.
    squares = sum(float((chunk / largest).square().sum()) for chunk in _chunks(tensor))
    bound = fraction * (squares / tensor.numel()) ** 0.5
    small = sum(int(((chunk / largest).abs() < bound).sum()) for chunk in _chunks(tensor))
    return small / tensor.numel()


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    import torch

    if tensor.is_complex():
        raise InputError("a histogram of a complex tensor is not defined", hint="give its real part or magnitude")
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK].to(device="cpu").to(torch.float64)


def _range(tensor: Tensor) -> tuple[float, float]:
    low, high, seen = np.inf, -np.inf, 0
    for chunk in _chunks(tensor):
        finite = chunk.isfinite()
        if not bool(finite.all()):
            index = seen + int((~finite).to(dtype=chunk.dtype).argmax())
            raise NonFiniteError(f"a tensor of shape {tuple(tensor.shape)} holds NaN or Inf at flat index {index}")
        low, high, seen = min(low, float(chunk.min())), max(high, float(chunk.max())), seen + chunk.numel()
    return (low, high) if seen else (0.0, 1.0)


def _edges(low: float, high: float, bins: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if low == high:
        pad = 0.5 * abs(low) or 0.5
        low, high = max(low - pad, -_LARGEST), min(high + pad, _LARGEST)
    if max(-low, high) < _LARGEST / 4:
        return np.linspace(low, high, bins + 1)
    steps = np.linspace(0.0, 1.0, bins + 1)
    return np.asarray(low * (1 - steps) + high * steps)
