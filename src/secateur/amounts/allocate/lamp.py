"""Layer-adaptive magnitude: scores that may be compared between layers."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.amounts.allocate.base import Allotment, Amounts, register
from secateur.errors import RecipeError


@register("lamp")
def lamp(request: Allotment) -> Amounts:
    """Replace each score by its LAMP score; one ranking over all layers follows.

    Meant for magnitudes. The largest score of each layer becomes 1, so no layer is emptied while another has
    anything left. A bad choice for scores that already compare well between layers.

    Raises:
        RecipeError: a score is negative.

    Source:
        Lee, Park, Mo, Ahn, Shin, "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021, equation 4.
    """
    for name, score in request.scores.items():
        if bool((score < 0).any()):
            raise RecipeError(
                f"allocation 'lamp' squares scores, and {name!r} has negative ones",
                hint="use it with magnitude, or another allocation",
            )
    return Amounts({name: lamp_scores(score) for name, score in request.scores.items()})


def lamp_scores(score: Tensor) -> Tensor:
    """Square of each score over the sum of squares of all that are not smaller.

    Args:
        score: scores of one layer, any shape; of equal ones the later counts as the larger.

    Returns:
        float64 tensor of the same shape with values in [0, 1].

    Cost:
        One sort.

    Example:
        >>> [round(s, 4) for s in lamp_scores(torch.tensor([3.0, 1.0, 2.0])).tolist()]
        [1.0, 0.0714, 0.3077]
    """
    # Stable, so that of equal scores the later counts as the larger, as everywhere.
    ascending, order = score.detach().to(torch.float64).flatten().sort(stable=True)
    square = (ascending / ascending[-1:].clamp(min=torch.finfo(torch.float64).tiny)).square()
    # Summed from the large end: total minus prefix would lose all digits there.
    tail = square.flip(0).cumsum(0).flip(0)
    ratio = torch.where(tail > 0, square / tail, 0.0)
    ratio[-1:] = 1.0
    return torch.empty_like(ratio).scatter_(0, order, ratio).view(score.shape)
