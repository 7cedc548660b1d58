"""Second moments of what a consumer reads, streamed: all that reconstruction of its output needs.

Legend: g groups of a convolution (1 for linear layers), N rows (samples and positions), k columns of the weight
(input channels times kernel places), n outputs, u units. Y = X W^T, so X^T Y = G W^T with G = X^T X: outputs
are never stored. Everything in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import UnsupportedError
from secateur.statistics.activations.input_norms import CONVOLUTIONS
from secateur.statistics.activations.observe import Flow, argument
from secateur.statistics.activations.streams import Statistic, Total, whole
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Step

ROWS = 512  # of a matrix of moments that are weighted at a time: a second one as large is never made
_PRODUCTS = ("mm", "addmm", "linear", "_addmm_activation", "mv", "addmv")
_TURNS = ("t", "transpose", "permute", "alias", "detach", "numpy_T")


@dataclass(frozen=True)
class Geometry:
    """How a call multiplies windows of its input with a weight.

    Args:
        turned: the weight lies as [k, n] (as in transformers' Conv1D) instead of [n, k].
        kernel: sizes of the window, () for linear layers.
        stride, padding, dilation: per spatial dimension.
        groups: of the convolution.
    """

    turned: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as float64 [g, n per group, k]."""
        # float64 throughout: solutions of nearly singular systems lose half of the digits.
        weight = weight.detach().double()
        if self.turned:
            weight = weight.T
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, matrix_gnk: Tensor, like: Tensor) -> Tensor:
        """Back into the shape, dtype and device of a weight."""
        shape = like.T.shape if self.turned else like.shape
        weight = matrix_gnk.reshape(shape)
        # The layout that a fresh weight has; a transposed view would be saved as it lies.
        return (weight.T if self.turned else weight).to(like).contiguous()

    def columns(self, per_channel: Tensor) -> Tensor:
        """Values of input channels -> values of the columns: [g, k]."""
        # Columns run over channels first and places of the kernel last, as the weight lies in memory.
        return per_channel.view(self.groups, -1).repeat_interleave(prod(self.kernel), 1)

    def rows(self, value: Tensor, where: Tensor | None = None) -> Tensor:
        """Windows of an input as float64 [g, N, k].

        Args:
            value: [N, C, *space] or [C, *space] for convolutions, [..., k] for products.
            where: int64 [samples, P] positions of the output to take per sample; None takes all.
        """
        if not self.kernel:
            # A copy even of float64: the model may go on to write into what it has read.
            return value.to(torch.float64, copy=True).reshape(1, -1, value.shape[-1])
        spatial = len(self.kernel)
        value = value if value.dim() == spatial + 2 else value[None]
        value = F.pad(value, [p for size in reversed(self.padding) for p in (size, size)])
        for d, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            # Windows as views: nothing is copied until the sampled places are picked.
            value = value.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
        if where is None:
            value = value.movedim(1, 1 + spatial).flatten(0, spatial)
        else:
            places: tuple[Tensor, ...] = torch.unravel_index(where, value.shape[2 : 2 + spatial])
            sample = torch.arange(len(value), device=value.device)[:, None]
            value = value.movedim(1, -1 - spatial)[(sample, *places)].flatten(0, 1)
        grouped = value.double().reshape(len(value), self.groups, -1)
        return grouped.transpose(0, 1).contiguous()

    def places(self, value: Tensor, sampler: Sampler) -> Tensor | None:
        """Positions of the output at which the rows are taken, None for all.

        Args:
            value: the input of the call.
            sampler: draws them.
        """
        # Without a batch dimension there is no sample to draw places for; all of the few are taken.
        if not self.kernel or value.dim() != len(self.kernel) + 2:
            return None
        sizes = zip(value.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        space = prod((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return sampler.draw(value.shape[0], space, value.device)

    def targets(self, result: Tensor, where: Tensor | None = None) -> Tensor:
        """What the call returned, at the same rows: float64 [N, outputs]."""
        if not self.kernel:
            return result.to(torch.float64, copy=True).reshape(-1, result.shape[-1])
        spatial = len(self.kernel)
        result = (result if result.dim() == spatial + 2 else result[None]).flatten(2)
        if where is None:
            return result.to(torch.float64, copy=True).transpose(1, 2).flatten(0, 1)
        index = where[:, None, :].expand(-1, result.shape[1], -1)
        return result.gather(2, index).transpose(1, 2).flatten(0, 1).double()


def geometry(flow: Flow, step: Step) -> Geometry:
    """Geometry of a recorded call.

    Raises:
        UnsupportedError: neither a plain convolution nor a product with a whole weight; names the call.
    """
    operand, dim = next(((n, d) for n, d, _ in step.contracted if n not in flow.activations), (-1, 0))
    name, chain = flow.source(operand) if operand >= 0 else ("", [])
    whole = bool(name) and all(base_name(call.func) in _TURNS for call, _ in chain)
    kind = base_name(step.func)
    # "whole": the weight is used as it lies, turned at most, so that a solution can be written back into it.
    if whole and kind in CONVOLUTIONS and not argument(step, "transposed", False):
        kernel = tuple(axis.size for axis in flow.trace.axes[operand][2:])
        options = (_pair(argument(step, key), len(kernel)) for key in ("stride", "padding", "dilation"))
        stride, padding, dilation = options
        return Geometry(False, kernel, stride, padding, dilation, int(argument(step, "groups", 1)))
    # Products of two dimensions only: a stack of experts is no weight of one layer.
    if whole and kind in _PRODUCTS and len(flow.trace.axes[operand]) == 2:
        turns = sum(base_name(call.func) in ("t", "transpose", "permute", "numpy_T") for call, _ in chain)
        # The contracted dimension is the last of [n, k]; each transpose on the way turns that round.
        return Geometry(turned=(dim == 0) == (turns % 2 == 0))
    raise UnsupportedError(
        f"{step.place.op} in {step.place.module!r} cannot be reconstructed",
        why="only linear layers and convolutions that are not transposed, with a weight of their own, are refitted",
        hint="choose another criterion for this group, or protect it",
    )


def _pair(value: object, rank: int) -> tuple[int, ...]:
    sizes = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(cast(int, value))]
    return tuple(sizes * rank if len(sizes) == 1 else sizes)


class Sampler:
    """Places in space that are looked at: as good as random, and the same however the samples are batched.

    Args:
        positions: places per sample; None takes all.
        seed: of the draw.
    """

    def __init__(self, positions: int | None, seed: int) -> None:
        self.positions, self.seed = positions, seed
        self.samples = 0

    def draw(self, samples: int, space: int, device: torch.device) -> Tensor | None:
        """Int64 [samples, P] for the next samples, None for all places."""
        # By the number of the sample in the whole data, so that other batches draw the same places.
        first, self.samples = self.samples, self.samples + samples
        if self.positions is None or space <= self.positions:
            return None
        start, count = first * self.positions, samples * self.positions
        mixed = np.arange(start, start + count, dtype=np.uint64).reshape(samples, self.positions)
        # splitmix64: a counter through a mixer is a stream without state.
        mixed = mixed + np.uint64(self.seed << 40 & (1 << 64) - 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return torch.from_numpy((mixed % np.uint64(space)).astype(np.int64)).to(device)


class Gram(Statistic):
    """X^T X of what one call reads.

    Args:
        geometry: of the call.
        sampler: places in space.
    """

    def __init__(self, geometry: Geometry, sampler: Sampler) -> None:
        self.geometry, self._sampler = geometry, sampler
        self.total = torch.zeros(())
        self.rows = 0

    def add(self, value: Tensor, dim: int) -> None:
        """Take in one batch."""
        where = self.geometry.places(value, self._sampler)
        rows_gNk = self.geometry.rows(value, where)
        if self.total.dim() == 0:
            columns = rows_gNk.shape[2]
            self.total = rows_gNk.new_zeros(len(rows_gNk), columns, columns)
        # Added in place: of the largest matrix there is room for one.
        self.total.baddbmm_(rows_gNk.transpose(1, 2), rows_gNk)
        self.rows += rows_gNk.shape[1]

    def join(self, total: Total) -> None:
        """Add up products and rows."""
        self.total, self.rows = total(self.total), whole(total, self.rows)

    def passed(self, samples: int) -> None:
        """The places of a sample go by its number in the whole data, whoever takes it."""
        self._sampler.samples += samples


@dataclass(frozen=True, eq=False)
class Reading:
    """One consumer of a group, and the second moments of what it reads.

    Args:
        weight: name of its weight.
        gram: X^T X / N, float64 [g, k, k].
        matrix: the weight, float64 [g, n, k].
        unit: int64 [g, k], unit of every column, -1 for none.
    """

    weight: str
    gram: Tensor
    matrix: Tensor
    unit: Tensor


def unit_gram(reading: Reading, units: int, matrix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Second moments of what every unit contributes to the output, and their products with the whole.

    With Z_u the contribution of unit u under the weights `matrix` and Y the sum of the contributions of all
    units under the original weights: K = <Z_u, Z_v>, b = <Z_u, Y>. Columns without unit are left out of both.

    Args:
        reading: the consumer.
        units: number of units.
        matrix: weights [g, n, k] in place of the original ones.

    Returns:
        K float64 [u, u] and b float64 [u].
    """
    # Columns of other groups and of none stay as they are, so their part of the output is no matter here.
    owned = (reading.unit >= 0).double()
    original = reading.matrix * owned[:, None, :]
    matrix = original if matrix is None else matrix * owned[:, None, :]
    with_output = (matrix * (original @ reading.gram)).sum(1)
    gram = torch.zeros(units, units, dtype=torch.float64)
    output = torch.zeros(units, dtype=torch.float64)
    of_groups = zip(reading.gram, matrix, with_output, reading.unit.clamp(min=0), strict=True)
    for moments, weights, row, unit in of_groups:
        half = torch.zeros(units, len(unit), dtype=torch.float64)
        for start in range(0, len(unit), ROWS):
            some = slice(start, start + ROWS)
            # <Z_i, Z_j> of columns: the moment of the inputs times the product of their weights.
            half.index_add_(0, unit[some], moments[some] * (weights[:, some].T @ weights))
        gram.index_add_(1, unit, half)
        output.index_add_(0, unit, row)
    return gram, output
