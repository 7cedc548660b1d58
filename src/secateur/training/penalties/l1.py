"""L1 on weights: makes single weights zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.training.penalties.base import Penalty, register, soft_threshold


@register
class L1(Penalty):
    """Sum of |w|. By the proximal step weights become exactly 0; by the sub-gradient they only come near it.

    Source:
        Tibshirani, "Regression shrinkage and selection via the lasso", 1996; the proximal step is soft thresholding.
    """

    name = "l1"
    summary = "sum of |w|: single weights become zero"

    def cost(self) -> Tensor:
        """Sum of |w|."""
        return torch.stack([parameter.abs().sum() for parameter in self.paying.values()]).sum()

    def shrink(self, rates: Mapping[str, float]) -> None:
        """Towards 0 by a constant amount."""
        for name, rate in rates.items():
            soft_threshold(self.paying[name], rate)
