"""Hard-concrete gates: the expected number of units that are left, as a penalty with a gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from secateur.errors import RecipeError
from secateur.planning.build import GranularityLike
from secateur.registry import real_number
from secateur.training.penalties.base import register
from secateur.training.penalties.gates import GatePenalty
from secateur.types import Example, Protect, Scores

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature and stretch of the paper


class _Stretched(nn.Module):
    """log alpha -> gate in [0, 1]: with noise while training, its typical value else."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: Tensor | None = None

    def forward(self, log_alpha: Tensor) -> Tensor:
        """Equations 10 and 13."""
        if self.training and self.noise is not None:
            u = self.noise
            s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
        else:
            s = torch.sigmoid(log_alpha)
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@register
class HardConcrete(GatePenalty):
    """Sum over units of the probability that their gate is not 0: an L0 norm that gradients can lower.

    While training every forward draws its gates; in eval mode they have their typical value, often exactly 0 or 1.

    Args:
        model: gates are inserted into it until `finish`.
        example: what one forward takes.
        granularity: what a unit is: channel, neuron, head.
        strength: as for every penalty.
        optimizer: gets log alpha of the gates as a parameter group of its own, without weight decay.
        protect: as for every penalty.
        lr: learning rate of log alpha; None takes that of the optimizer's first group.
        drop: probability at the beginning that a gate is closed before it is stretched.

    Source:
        Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", 2018, equations 10 to 13.
    """

    name = "hard_concrete"
    summary = "expected number of units that are left (L0)"
    methods = ("subgradient",)

    def __init__(
        self,
        model: nn.Module,
        example: Example = None,
        *,
        strength: float,
        granularity: GranularityLike = "channel",
        optimizer: Optimizer | None = None,
        protect: Protect = (),
        lr: float | None = None,
        drop: float = 0.05,
    ) -> None:
        if not 0 < real_number("drop", drop) < 1:
            raise RecipeError(f"drop={drop!r} of hard_concrete", hint="a probability in (0, 1)")
        self._start = math.log(1 - drop) - math.log(drop)
        super().__init__(
            model,
            example,
            strength=strength,
            granularity=granularity,
            optimizer=optimizer,
            protect=protect,
            lr=lr,
        )

    def _paying(self) -> dict[str, nn.Parameter]:
        own = super()._paying()
        # One source of noise per group: all that read a unit see the same gate.
        self._stretched = {name: _Stretched() for name in own}
        with torch.no_grad():
            for log_alpha in own.values():
                log_alpha.fill_(self._start)
        for _, _, gate in list(self.gates._found()):
            parametrize.register_parametrization(gate, "z", self._stretched[gate.group], unsafe=True)
        self._drawing = self.model.register_forward_pre_hook(self._draw)
        return own

    def _draw(self, *_: object) -> None:
        for name, log_alpha in self.paying.items():
            noise = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
            self._stretched[name].noise = noise.detach()

    def cost(self) -> Tensor:
        """Sum of the probabilities that gates are not 0."""
        shift = BETA * math.log(-GAMMA / ZETA)
        return torch.stack([torch.sigmoid(log_alpha - shift).sum() for log_alpha in self.paying.values()]).sum()

    def scores(self) -> Scores:
        """The gates as they are in eval mode, higher = keep."""
        typical = {
            name: (torch.sigmoid(log_alpha.detach()) * (ZETA - GAMMA) + GAMMA).clamp(0, 1).float()
            for name, log_alpha in self.paying.items()
        }
        return Scores(typical, self.groups)

    def finish(self) -> Scores:
        """Fold the typical gates into the weights, and let optimizer and model go."""
        modes: list[tuple[Any, bool]] = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        scores = super().finish()
        self._drawing.remove()
        for module, mode in modes:
            module.training = mode
        return scores
