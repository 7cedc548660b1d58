"""Weights as factors of products, and tensors without what is removed: the replay with less work."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from secateur.model.tensors import can_be_nan
from secateur.structure.axes import resolve
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Step

PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "linear"])
GROUPS, TRANSPOSED = 8, 6  # places of arguments of aten.convolution
NAN = float("nan")


class Factor(NamedTuple):
    """A weight in a product.

    Args:
        at: its place among the arguments.
        summed: its dimension that the product sums over.
        free: its dimension that the result inherits.
        result: that dimension of the result.
        bias: place of what is added, or None.
    """

    at: int
    summed: int
    free: int
    result: int
    bias: int | None


def factor_at(step: Step, at: int, rank: int) -> Factor | None:
    """How an operator treats the weight at a place of its arguments."""
    name = base_name(step.func)
    if name == "mm" and rank == 2:
        return Factor(at, 0, 1, 1, None) if at == 1 else Factor(at, 1, 0, 0, None)
    if name == "addmm" and rank == 2 and at > 0:
        return Factor(at, 0, 1, 1, 0) if at == 2 else Factor(at, 1, 0, 0, 0)
    if name == "linear" and rank == 2 and at == 1:
        return Factor(at, 1, 0, -1, 2)
    if name == "convolution" and at == 1:
        channels = 1 - rank  # of the result: what stands before the spatial dimensions
        return Factor(at, 0, 1, channels, 2) if step.args[TRANSPOSED] else Factor(at, 1, 0, channels, 2)
    return None


def with_bias_at(args: list[object], factor: Factor, size: int, stay: Tensor) -> list[object]:
    """The arguments with what is added at the kept positions of the dimension that the result inherits."""
    bias = args[factor.bias] if factor.bias is not None and factor.bias < len(args) else None
    if not isinstance(bias, Tensor) or (bias.dim() == 1 and factor.result == 0):
        return args  # a vector is aligned from the right, so it adds the same to every row of a result
    d = 0 if bias.dim() == 1 else factor.result
    if bias.dim() > d and bias.shape[d] == size:  # else it is broadcast
        args[cast(int, factor.bias)] = bias.index_select(d, stay.to(bias.device))
    return args


def spread(tensor: Tensor, d: int, size: int, stay: Tensor) -> Tensor:
    """A tensor at its full size again, with NaN (or zero, in integers) where something is removed."""
    shape = list(tensor.shape)
    shape[d] = size
    out = torch.full(shape, NAN if can_be_nan(tensor) else 0, dtype=tensor.dtype, device=tensor.device)
    return out.index_copy_(d, stay.to(tensor.device), tensor)


def pick(tensor: Tensor, d: int, stay: Tensor) -> Tensor:
    """`index_select`, along the rows in memory where the tensor is a transposed matrix (three times as fast)."""
    stay = stay.to(tensor.device)
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        return tensor.t().index_select(1 - d, stay).t()
    return tensor.index_select(d, stay)


def sums_in_full(step: Step) -> bool:
    """Whether both operands can go without the removed positions, rather than with zeros there (the same, faster)."""
    numbers = [number for number, _, _ in step.contracted]
    if len(numbers) != 2 or numbers[0] == numbers[1]:
        return False
    (_, _, a), (_, _, b) = step.contracted
    if resolve(a) is not resolve(b):
        return False
    name = base_name(step.func)
    # With several groups the summed dimension is only part of the channels, so positions must keep their places.
    return name in PRODUCTS or (name == "convolution" and step.args[GROUPS] == 1)
