"""Network slimming: L1 on the scales of batch norms, so that whole channels become small."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.kinds.weights.granularity import is_within
from secateur.planning.build import grouped
from secateur.training.penalties.base import Penalty, register, soft_threshold


@register
class Slimming(Penalty):
    """Sum of |gamma| over norms. Train with it, cut channels by criterion "bn-scale", train on without it.

    With an example the scales of channels that can be cut pay; without one, all scales of batch norms. A bad choice
    for networks without such norms: use "gates".

    Source:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, equation 1 (strength
        1e-4 to 1e-5, sub-gradient).
    """

    name = "slimming"
    summary = "sum of |gamma| of norms: channels become small"

    def _paying(self) -> dict[str, nn.Parameter]:
        known = dict(self.model.named_parameters())
        if self.example is not None:
            groups, _ = grouped(self.model, self.example, "channel", self.protect)
            scales = [span.tensor for group in groups for span in group.spans if span.role == "scale"]
            return {name: known[name] for name in dict.fromkeys(scales) if name in known}
        norms = [name for name, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        scales = [f"{name}.weight".lstrip(".") for name in norms if not is_within(name, self.protect)]
        return {name: known[name] for name in scales if name in known}

    def cost(self) -> Tensor:
        """Sum of |gamma|."""
        return torch.stack([parameter.abs().sum() for parameter in self.paying.values()]).sum()

    def shrink(self, rates: Mapping[str, float]) -> None:
        """Towards 0 by a constant amount."""
        for name, rate in rates.items():
            soft_threshold(self.paying[name], rate)
