"""One ranking over all groups."""

from __future__ import annotations

from secateur.amounts.allocate.base import Allotment, Amounts, register


@register("global")
def global_(request: Allotment) -> Amounts:
    """Let all units compete by their scores as they are.

    A bad choice where scores of different layers have different scales: it can empty a layer, so use a
    criterion that estimates the loss, or set `min_keep`.
    """
    return Amounts(request.scores)
