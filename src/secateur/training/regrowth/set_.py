"""SET: what comes back is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from secateur.training.regrowth.base import Regrowth, register
from secateur.types import Group


@register
@dataclass(frozen=True, kw_only=True)
class SET(Regrowth):
    """The smallest weights go, and as many masked ones come back at random.

    Needs no gradient of masked weights, so it costs nothing; slower to find good places than `RigL`.

    Source:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018.
    """

    name: ClassVar[str] = "set"
    summary: ClassVar[str] = "as many come back at random as go"

    def wish(self, group: Group, gradients: Mapping[str, Tensor], generator: Generator) -> Tensor:
        """A random order."""
        return torch.rand(group.shape, generator=generator)
