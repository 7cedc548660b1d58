"""The matrices that are solved: how a parameter lies, which pattern each follows, how much each gives up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from secateur.amounts.allocate.base import round_half_up
from secateur.amounts.patterns import per_pattern
from secateur.errors import RecipeError
from secateur.kinds.weights.granularity import Granularity
from secateur.kinds.weights.nm import NM
from secateur.kinds.weights.weight import Weight
from secateur.request import Amount, Request
from secateur.solve.blocks.products import WHOLE, MatrixSite
from secateur.solve.patterns import BlockPattern, NofM, Pattern, PerLayer, PerRow


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix [o, d] inside a parameter.

    Args:
        site: parameter and number of the matrix in its stack.
        shape: (o, d).
        turned: the parameter holds it as [d, o].
        kernel: places of a convolution's window; 1 for all others.
    """

    site: MatrixSite
    shape: tuple[int, int]
    turned: bool
    kernel: int = 1

    def read(self, parameter: Tensor) -> Tensor:
        """The matrix, at least in float32."""
        found = parameter.detach() if self.site[1] == WHOLE else parameter.detach()[self.site[1]]
        if self.kernel > 1 or found.dim() > 2:
            found = found.flatten(2).transpose(1, 2).reshape(found.shape[0], -1)
        elif self.turned:
            found = found.T
        return found.to(torch.promote_types(found.dtype, torch.float32), copy=True).contiguous()

    def write(self, value: Tensor, parameter: Tensor) -> None:
        """Put a matrix (or a mask of its shape) back where it lies."""
        place = parameter.detach() if self.site[1] == WHOLE else parameter.detach()[self.site[1]]
        if self.kernel > 1 or place.dim() > 2:
            value = value.reshape(place.shape[0], self.kernel, -1).transpose(1, 2).reshape(place.shape)
        elif self.turned:
            value = value.T
        place.copy_(value)


def matrices_of(weight: Weight, *, groups: int = 1) -> list[Matrix] | str:
    """The matrices of a weight, or why it has none that could be solved."""
    if weight.dims is None or groups > 1:
        return "a grouped convolution: every output reads inputs of its own" if groups > 1 else "it is no matrix"
    if weight.matrix:
        if weight.transposed and len(weight.shape) > 2:
            return "transposed convolutions are not solved here"
        out, into, *kernel = weight.matrix_shape
        return [Matrix((weight.name, WHOLE), (out, into * prod(kernel)), weight.transposed, prod(kernel))]
    if len(weight.shape) != 3 or 0 in weight.dims:
        return "it is no stack of matrices"
    out, into = (weight.shape[d] for d in weight.dims)
    turned = weight.dims[1] < weight.dims[0]
    return [Matrix((weight.name, part), (out, into), turned) for part in range(weight.shape[0])]


def patterns_of(
    matrices: Sequence[Matrix],
    granularity: Granularity,
    request: Request,
    shares: Mapping[MatrixSite, float] | None = None,
) -> dict[MatrixSite, Pattern]:
    """The pattern of every matrix; what goes adds up to the exact count of the target.

    Args:
        matrices: all that are solved.
        granularity: element, n:m or block.
        request: target and scope.
        shares: how much of each matrix goes, where not all give up the target's share; it is their mean.

    Raises:
        RecipeError: a granularity, scope or target that solvers do not take, or n:m and another share than its own.
    """
    given = {} if request.target is None else request.target.given()
    if set(given) != {"sparsity"}:
        raise RecipeError(
            f"solvers take one target, sparsity, not {', '.join(given) or 'none'}.",
            hint="for example --set target.sparsity=0.5",
        )
    if granularity.name not in ("element", "n:m", "block"):
        raise RecipeError(f"solvers do not know granularity {granularity.name!r}.", hint="element, n:m (2:4) or block")
    if granularity.name == "element" and request.scope not in ("row", "local"):
        raise RecipeError(
            f"scope {request.scope!r} is not for solvers.",
            why="blocks are solved one after the other, so weights of different layers do not compete",
            hint="scope row (equal amounts in every row) or local (in every layer)",
        )
    found: dict[MatrixSite, Pattern] = {}
    for members, share in _shares(matrices, given["sparsity"]):
        found.update(_exactly(members, granularity, request.scope, share, shares))
    return found


def share_of(granularity: Granularity, request: Request) -> float:
    """The one share that a target asks for, which blocks may then give up unequally.

    Raises:
        RecipeError: there is more than one, or none that could differ.
    """
    amount = {} if request.target is None else request.target.given().get("sparsity", {})
    if isinstance(amount, Mapping) or granularity.name == "n:m":
        raise RecipeError(
            "blocks.allocation needs one sparsity for all weights, of a granularity that can differ.",
            hint="a number as target.sparsity, and granularity element or block",
        )
    return float(amount)


def _shares(matrices: Sequence[Matrix], amount: Amount) -> list[tuple[list[Matrix], float]]:
    if not isinstance(amount, Mapping):
        return [(list(matrices), float(amount))]
    names = list(dict.fromkeys(matrix.site[0] for matrix in matrices))
    return [
        ([matrix for matrix in matrices if matrix.site[0] in members], share)
        for members, share in per_pattern(names, amount)
    ]


def _exactly(
    matrices: Sequence[Matrix],
    granularity: Granularity,
    scope: str,
    share: float,
    shares: Mapping[MatrixSite, float] | None,
) -> dict[MatrixSite, Pattern]:
    options = granularity.options()
    if granularity.name == "n:m":
        n, m = int(options["n"]), int(options["m"])  # type: ignore[arg-type]
        NM(n=n, m=m).require({"sparsity": share})
        return {matrix.site: NofM(n, m) for matrix in matrices}
    shape: Any = options["shape"] if granularity.name == "block" else (1, 1)
    rows, columns = int(shape[0]), int(shape[1])
    found: dict[MatrixSite, Pattern] = {}
    units, gone, taken = 0, 0.0, 0
    for matrix in matrices:
        out, into = matrix.shape
        own = -(-out // rows) * -(-into // columns)
        units += own
        # Of running totals, so that roundings of single matrices do not add up; rounded as `select` rounds them.
        if shares is None or matrix is matrices[-1]:
            gone = float(round_half_up(share, units))
        else:
            gone += shares[matrix.site] * own
        count = min(max(round(gone) - taken, 0), own)
        taken += count
        if granularity.name == "block":
            found[matrix.site] = BlockPattern(rows, columns, count)
        else:
            found[matrix.site] = PerRow(count) if scope == "row" else PerLayer(count)
    return found
