"""One interface for everything that solves a layer: statistics of the layer go in, a mask and weights come out.

Legend: o outputs, d inputs. A layer is W [o, d] on inputs X [d, tokens]; H = X X^T / tokens. The error of weights V is
tr((W - V) H (W - V)^T), the mean square by which the outputs differ. Given the mask, rows do not depend on each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, cast

import torch
from torch import Tensor

from secateur.registry import Registry
from secateur.request import Plain
from secateur.solve.moments import SecondMoments
from secateur.solve.patterns import Pattern

SOLVERS: Registry[type[Solver]] = Registry("solver", "solvers")


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer that is to be solved.

    Args:
        weight: what the outputs are held against, [o, d].
        moments: of the inputs; layers that read the same input share one object, and its factorisations.
        pattern: which masks are allowed, and how many weights go.
    """

    weight: Tensor
    moments: SecondMoments
    pattern: Pattern


@dataclass(frozen=True, eq=False)
class Solved:
    """What a solver found.

    Args:
        mask: bool [o, d], True = keep; exactly as many False as the pattern says.
        weight: [o, d], +0.0 wherever the mask is False.
    """

    mask: Tensor
    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor) -> Solved:
        """Weights under a mask. Zeros are +0.0, which packers of other libraries rely on."""
        return cls(mask, torch.where(mask, weight, weight.new_zeros(())))


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A way to choose a mask and what stays. Options are fields."""

    name: ClassVar[str]
    summary: ClassVar[str]
    # Whether the inputs' second moments are needed in full, or their diagonal alone.
    needs_gram: ClassVar[bool] = True
    # Whether the weights that stay are moved: only then can targets other than the layer's own make a difference.
    moves: ClassVar[bool] = True

    @abstractmethod
    def solve(self, problem: Problem) -> Solved:
        """Choose the mask and the weights of one layer."""

    def options(self) -> dict[str, Plain]:
        """Every option with its value."""
        return {field.name: cast(Plain, getattr(self, field.name)) for field in fields(self)}


def error_of(change: Tensor, gram: Tensor) -> float:
    """Mean square that a change of the weights makes in the outputs: tr(change H change^T)."""
    return float(((change @ gram) * change).sum(dtype=torch.float64))
