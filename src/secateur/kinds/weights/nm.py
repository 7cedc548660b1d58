"""n:m patterns: n weights are kept of each m neighbours along the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import InputError, RecipeError
from secateur.kinds.weights.granularity import Granularity, register
from secateur.kinds.weights.weight import Weight
from secateur.registry import whole_number
from secateur.types import Group

COMPARED = 16  # entries of a line up to which all pairs are compared, where longer lines are sorted


@register
@dataclass(frozen=True, kw_only=True)
class NM(Granularity):
    """n weights are kept of each m consecutive ones along the input dimension ("2:4": two of four).

    2:4 is what sparse tensor cores run. The input dimension is dimension 1 of Linear and Conv weights
    ([out, in, ...]: for a convolution the input channels, at each kernel position on its own) and dimension 0
    of ConvTranspose and of Conv1D in transformers ([in, out, ...]). Where m does not divide the width, the
    last ``width % m`` weights of each line are kept; the group's attribute "tail" says how many. A bad choice
    where the hardware does not run the pattern: it costs more accuracy than free elements at equal sparsity.

    Args:
        n: kept of each m.
        m: length of a pattern; at least n + 1.

    Raises:
        RecipeError: not 0 < n < m.

    Source:
        Mishra, Latorre, Pool, Stosic, Stosic, Venkatesh, Yu, Micikevicius, "Accelerating Sparse Deep Neural
        Networks", 2021, section 3.
    """

    name: ClassVar[str] = "n:m"
    summary: ClassVar[str] = "n weights kept of each m neighbours along the input, for example 2:4"
    single: ClassVar[bool] = True

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Refuse patterns that keep nothing or everything."""
        if whole_number("n", self.n, least=1) >= whole_number("m", self.m, least=1):
            raise RecipeError(
                f"{self.n}:{self.m} keeps everything" if self.n == self.m else f"{self.n}:{self.m} is no pattern",
                hint="n:m keeps n of each m weights, so n is smaller than m, for example 2:4",
            )

    @property
    def share(self) -> float:
        """The share of the weights that goes, where m divides the width."""
        return 1 - self.n / self.m

    def require(self, amounts: Mapping[str, object]) -> None:
        """Refuse an amount that is not the pattern's own.

        Args:
            amounts: what was asked for, by its name.

        Raises:
            RecipeError: anything but a sparsity of `share`.
        """
        for name, amount in amounts.items():
            if name != "sparsity" or not isinstance(amount, (int, float)) or abs(amount - self.share) > 1e-9:
                raise RecipeError(
                    f"granularity '{self.n}:{self.m}' fixes the sparsity at {self.share:g}.",
                    why=f"the target is {dict(amounts)}",
                    hint=f"Leave the target at sparsity: {self.share:g}, or out.",
                )

    def group(self, weight: Weight) -> Group | None:
        """One unit per element, as in granularity element; None where nobody knows which dimension is the input."""
        if weight.width is None:
            return None
        tail = weight.width % self.m
        return weight.group(self.name, weight.shape, None, n=self.n, m=self.m, tail=tail)


def keep_pattern(score: Tensor, n: int, m: int, *, dim: int = 1) -> Tensor:
    """Keep the n highest scores of each m along a dimension; of equal ones the later is kept.

    Args:
        score: scores of single weights, at least 2-D.
        n: kept of each m.
        m: length of a pattern.
        dim: the input dimension.

    Returns:
        bool tensor of the score's shape, True = keep.

    Raises:
        InputError: the score has no dimension `dim`.

    Example:
        >>> keep_pattern(torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0]]), 2, 4)
        tensor([[False,  True,  True, False,  True]])
    """
    if score.dim() <= dim:
        raise InputError(f"a score of shape {tuple(score.shape)} has no dimension {dim} for an n:m pattern")
    keep = torch.ones_like(score, dtype=torch.bool)
    full = score.shape[dim] // m * m
    lines = score.narrow(dim, 0, full).movedim(dim, -1)
    lines = lines.reshape(*lines.shape[:-1], full // m, m)
    if m <= COMPARED and not bool(lines.isnan().any()):
        pattern = _places(lines) >= m - n
    else:
        dropped = lines.argsort(dim=-1, stable=True)[..., : m - n]
        pattern = torch.ones_like(lines, dtype=torch.bool).scatter_(-1, dropped, False)
    keep.narrow(dim, 0, full).copy_(pattern.flatten(-2).movedim(-1, dim))
    return keep


def _places(lines: Tensor) -> Tensor:
    """How many entries of its line are lower than each one, or equal and earlier: [..., m], int8.

    Every pair is compared, which for short lines takes a sixth of the time of a sort (a processor, 2:4).
    """
    entries = [entry.contiguous() for entry in lines.unbind(-1)]
    places = [torch.zeros_like(entry, dtype=torch.int8) for entry in entries]
    for later in range(len(entries)):
        for earlier in range(later):
            above = entries[earlier] <= entries[later]
            places[later] += above
            places[earlier] += ~above
    return torch.stack(places, dim=-1)
