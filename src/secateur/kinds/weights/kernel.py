"""Kernels of a convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.kinds.weights.granularity import Granularity, register
from secateur.kinds.weights.weight import Weight
from secateur.types import Group


@register
@dataclass(frozen=True, kw_only=True)
class Kernel(Granularity):
    """The kernel that connects one input channel with one output channel, over all spatial dimensions.

    Linear layers have no kernels and are left alone.

    Source:
        Mao, Han, Pool, Li, Liu, Wang, Dally, "Exploring the Granularity of Sparsity in Convolutional Neural
        Networks", 2017, section 3.
    """

    name: ClassVar[str] = "kernel"
    summary: ClassVar[str] = "kernels of convolutions: all spatial positions of one (output, input) pair"

    def group(self, weight: Weight) -> Group | None:
        """(out, in) units."""
        out, into, *spatial = weight.matrix_shape
        if not spatial:
            return None
        index = torch.arange(out * into).view(out, into, *[1] * len(spatial))
        return weight.group(self.name, (out, into), index)
