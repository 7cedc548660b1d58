"""L2 on weights: makes all weights smaller."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.training.penalties.base import Penalty, register


@register
class L2(Penalty):
    """Half the sum of w^2. Nothing becomes 0; weights that the loss does not need become small, and rank lower.

    The proximal form does not pass through the moments of Adam, much as the decay of AdamW.
    """

    name = "l2"
    summary = "half the sum of w^2: what the loss does not need becomes small"

    def cost(self) -> Tensor:
        """Half the sum of w^2."""
        return torch.stack([parameter.square().sum() for parameter in self.paying.values()]).sum() / 2

    def shrink(self, rates: Mapping[str, float]) -> None:
        """Divided by 1 + rate."""
        for name, rate in rates.items():
            self.paying[name].div_(1 + rate)
