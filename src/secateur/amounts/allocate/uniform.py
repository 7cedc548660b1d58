"""The same fraction from every group."""

from __future__ import annotations

from secateur.amounts.allocate.base import Allotment, Amounts, apportion, register


@register("uniform")
def uniform(request: Allotment) -> Amounts:
    """Remove from each group in proportion to its size, with an exact total.

    Needs no comparison of scores between layers. A bad choice for networks with small, sensitive layers: the
    first convolution loses as large a fraction as the widest one.
    """
    sizes = request.sizes
    removed = apportion(list(sizes.values()), request.count, request.limits)
    return Amounts(request.scores, dict(zip(sizes, removed, strict=True)))
