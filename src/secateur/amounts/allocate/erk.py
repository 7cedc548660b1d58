"""Erdos-Renyi kernel: layers with large fan-in and fan-out are pruned more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from secateur.amounts.allocate.base import Allotment, Amounts, apportion, register
from secateur.errors import RecipeError


@register("erk")
def erk(request: Allotment) -> Amounts:
    """Give each layer a density in proportion to (sum of its dimensions) / (product of its dimensions).

    Small layers stay dense, large ones carry the sparsity. A bad choice at low sparsity of networks with one
    dominant layer, which then has to give nearly everything.

    Source:
        Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", 2020, section 3;
        layers that would exceed density 1 stay dense and the others are solved again.
    """
    for name, shape in request.shapes.items():
        if len(shape) < 2:
            raise RecipeError(
                f"allocation 'erk' needs the shape of the weight of {name!r}, not {tuple(shape)}",
                hint="pass shapes={group: shape of its weight}",
            )
    sizes = request.sizes
    whole = list(sizes.values())
    shares = _shares([request.shapes[name] for name in sizes], whole)
    kept = apportion(shares, sum(whole) - request.count, whole, floors=[request.floors[name] for name in sizes])
    removed = {name: size - k for (name, size), k in zip(sizes.items(), kept, strict=True)}
    return Amounts(request.scores, removed)


def _shares(shapes: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[Fraction]:
    return [Fraction(sum(shape) * n, math.prod(shape) or 1) for shape, n in zip(shapes, sizes, strict=True)]
