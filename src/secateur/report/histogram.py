"""Exact histograms of tensors of any size, and how much of a tensor is nearly zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import NonFiniteError, RecipeError
from secateur.report.record import Histogram

# A chunk and what is computed from it stay in the processor's cache: some passes over it cost less than one over
# memory.
_CHUNK = 1 << 16
_LARGEST = float(np.finfo(np.float64).max)
NEAR_ZERO = 1e-2

# One chunk, in float32 or float64: numpy writes "any float" with this Any.
_Chunk = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Distribution:
    """How the elements of a tensor are spread.

    Args:
        histogram: counts in bins of equal width.
        near_zero: share of elements that are nearly zero, in [0, 1].
    """

    histogram: Histogram
    near_zero: float


def distribution(tensor: Tensor, bins: int = 40, *, fraction: float = NEAR_ZERO) -> Distribution:
    """Histogram and share of nearly zero elements at once; see `histogram` and `near_zero`.

    Args:
        tensor: any shape and dtype, any device; of complex numbers the magnitudes.
        bins: number of bins, at least 1.
        fraction: of the root mean square, below which a magnitude counts as nearly zero.

    Returns:
        Both, exact.

    Raises:
        RecipeError: bins < 1.
        NonFiniteError: the tensor holds NaN or Inf.

    Cost: two passes over the data.
    """
    if bins < 1:
        raise RecipeError(f"a histogram needs at least one bin, not {bins}")
    extent = _measure(tensor)
    counter, bound = _BinCounter(extent, bins), extent.bound(fraction)
    small = 0
    for chunk in _chunks(tensor):
        counter.add(chunk)
        small += _below(chunk, bound)
    return Distribution(counter.histogram(), extent.share(small))


def histogram(tensor: Tensor, bins: int = 40) -> Histogram:
    """Count the elements of a tensor in bins of equal width between its minimum and maximum.

    Every element falls into exactly one bin, so the counts add up to ``tensor.numel()``. A bin holds its left
    edge, the last one its right edge too, as in numpy. A heavy tail leaves most elements in one bin: read
    such a histogram on a logarithmic count axis.

    Args:
        tensor: any shape and dtype, any device; of complex numbers the magnitudes. Constant tensors get edges
            around the value, empty ones get [0, 1].
        bins: number of bins, at least 1.

    Returns:
        ``bins + 1`` edges and ``bins`` counts.

    Raises:
        RecipeError: bins < 1.
        NonFiniteError: the tensor holds NaN or Inf.

    Cost: two passes over the data; memory does not grow with it.

    Example:
        >>> import torch
        >>> histogram(torch.tensor([0.0, 1.0, 1.0, 4.0]), bins=2).counts
        (3, 1)
    """
    return distribution(tensor, bins).histogram


def near_zero(tensor: Tensor, *, fraction: float = NEAR_ZERO) -> float:
    """Tell which share of the elements is smaller in magnitude than a fraction of their root mean square.

    Args:
        tensor: any shape and dtype.
        fraction: of the root mean square, 0.01 by default.

    Returns:
        A share in [0, 1]; 1 for a tensor of zeros, 0 for an empty one.

    Raises:
        NonFiniteError: the tensor holds NaN or Inf.

    Cost: two passes over the data.

    Example:
        >>> import torch
        >>> near_zero(torch.tensor([1.0, -1.0, 0.001, 0.0]))
        0.5
    """
    extent = _measure(tensor)
    bound = extent.bound(fraction)
    return extent.share(sum(_below(chunk, bound) for chunk in _chunks(tensor)))


@dataclass(frozen=True)
class _Extent:
    """Size, ends and root mean square of a tensor."""

    size: int
    low: float
    high: float
    rms: float

    def bound(self, fraction: float) -> float:
        return fraction * self.rms

    def share(self, small: int) -> float:
        # Nothing is below the root mean square of zeros, and yet all of them are zero.
        if self.size == 0 or self.low == self.high == 0:
            return float(self.size > 0)
        return small / self.size


class _BinCounter:
    """Counts chunk by chunk. An element's bin is computed, and looked up only where rounding could have moved it."""

    def __init__(self, extent: _Extent, bins: int) -> None:
        self.low, self.high, self.bins = extent.low, extent.high, bins
        self.edges = _edges(extent.low, extent.high, bins)
        self.counts = np.zeros(bins + 1, np.int64)

    def add(self, chunk: _Chunk) -> None:
        dtype, width = chunk.dtype.type, self.high - self.low
        with np.errstate(over="ignore", divide="ignore"):
            scale = dtype(self.bins / width) if 0 < width <= np.finfo(dtype).max else dtype(np.inf)
        if width == 0:
            self.counts += chunk.size * self._looked_up(chunk[:1])
            return
        if not np.isfinite(scale) or scale < np.finfo(dtype).tiny:
            # A range beyond what the dtype can divide by: rare, so the slow way is good enough.
            self.counts += self._looked_up(chunk)
            return
        place = chunk - dtype(self.low)
        place *= scale
        found = place.astype(np.intp)
        self.counts += np.bincount(found, minlength=self.bins + 1)
        # Difference, scale and product are each rounded by less than eps of the place, which is at most `bins`; the
        # edges by less than eps of float64 of themselves. Only a place this close to an edge may be on its wrong side.
        edge = np.finfo(np.float64).eps * max(abs(self.low), abs(self.high)) / width
        place -= np.rint(place)
        np.abs(place, out=place)
        doubtful = np.flatnonzero(place < 8 * self.bins * (float(np.finfo(dtype).eps) + float(edge)))
        if doubtful.size:
            self.counts -= np.bincount(found[doubtful], minlength=self.bins + 1)
            self.counts += self._looked_up(chunk[doubtful])

    def _looked_up(self, values: _Chunk) -> npt.NDArray[np.int64]:
        bins = np.searchsorted(self.edges[1:-1], values.astype(np.float64), side="right")
        return np.bincount(bins, minlength=self.bins + 1).astype(np.int64)

    def histogram(self) -> Histogram:
        return Histogram(edges=tuple(self.edges.tolist()), counts=tuple(self.counts[: self.bins].tolist()))


def _chunks(tensor: Tensor) -> Iterator[_Chunk]:
    flat = tensor.detach().reshape(-1)
    # float32 holds every half-precision number; integers and float64 need more.
    dtype = torch.float32 if flat.is_floating_point() and flat.element_size() <= 4 else torch.float64
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        yield (part.abs() if part.is_complex() else part).to(device="cpu", dtype=dtype).numpy()


def _measure(tensor: Tensor) -> _Extent:
    low, high, squares, seen = np.inf, -np.inf, 0.0, 0
    # Squares of float64 leave its range at both ends; those of float32, summed in float64, never do.
    unit = 1.0
    if tensor.dtype in (torch.float64, torch.complex128) and tensor.numel():
        unit = float(tensor.detach().abs().max()) or 1.0
    for chunk in _chunks(tensor):
        least, most = float(chunk.min()), float(chunk.max())
        if not (np.isfinite(least) and np.isfinite(most)):
            index = seen + int((~np.isfinite(chunk)).argmax())
            raise NonFiniteError(f"a tensor of shape {tuple(tensor.shape)} holds NaN or Inf at flat index {index}")
        scaled = chunk / unit if unit != 1.0 else chunk
        squares += float(np.square(scaled, dtype=np.float64).sum())
        low, high, seen = min(low, least), max(high, most), seen + chunk.size
    if not seen:
        return _Extent(0, 0.0, 1.0, 0.0)
    return _Extent(seen, low, high, unit * (squares / seen) ** 0.5)


def _below(chunk: _Chunk, bound: float) -> int:
    # Compared in the chunk's own dtype: its numbers below the bound are those below the next number up from it.
    dtype = chunk.dtype.type
    limit = dtype(bound)
    # Zero: the bound of the tiniest numbers has underflowed, and zeros are below it all the same.
    if float(limit) < bound or limit == 0:
        limit = np.nextafter(limit, dtype(np.inf))
    return int(np.count_nonzero(np.abs(chunk) < limit))


def _edges(low: float, high: float, bins: int) -> npt.NDArray[np.float64]:
    if low == high:
        pad = 0.5 * abs(low) or 0.5
        low, high = max(low - pad, -_LARGEST), min(high + pad, _LARGEST)
    if max(-low, high) < _LARGEST / 4:
        return np.linspace(low, high, bins + 1)
    # linspace takes high - low, which overflows here.
    steps = np.linspace(0.0, 1.0, bins + 1)
    return np.asarray(low * (1 - steps) + high * steps)
