"""Low-rank adapters that are merged at every step, so that zeros stay zeros and nothing is left to merge at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.registry import suggestion


@dataclass(frozen=True)
class AdapterSpec:
    """Which weights get an adapter, and how large.

    Args:
        rank: of the change that can be learned.
        scale: factor of the change.
        targets: patterns of parameter names; all weights of linear layers and convolutions by default.

    Raises:
        RecipeError: a number out of range.
    """

    rank: int = 8
    scale: float = 2.0
    targets: Sequence[str] = ("*",)

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.scale > 0 or not self.targets:
            raise RecipeError(
                f"adapters: rank {self.rank}, scale {self.scale}, targets {list(self.targets)}",
                hint="rank is at least 1, scale above 0, and there is a target at least",
            )


class Adapters:
    """``W = W0 + scale * mask * (B A)`` for every target, held in the weights themselves.

    Only A and B are trained: their gradients follow from that of W by the chain rule, so the model needs no other
    modules, and whatever uses a weight sees the merged one. All other parameters stand still.

    Args:
        model: its parameters are frozen but for the targets; whoever calls gives ``requires_grad`` back.
        spec: which and how large.
        masks: parameter name -> bool, True = keep; the change is 0 elsewhere.

    Raises:
        RecipeError: no weight is named, or the rank is larger than a weight.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1; the mask on the merged
        change as in Lu et al., "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning", 2024.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec, masks: Mapping[str, Tensor]) -> None:
        self._scale = spec.scale
        self._parts: list[tuple[nn.Parameter, Tensor, nn.Parameter, nn.Parameter, Tensor | None]] = []
        chosen = _chosen(model, spec)
        named = dict(model.named_parameters(remove_duplicate=False))
        # By identity, since a mask may be given under any name of a tied weight.
        by_parameter = {id(named[name]): mask for name, mask in masks.items()}
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is one for one in chosen.values()))
        for name, weight in chosen.items():
            rows, columns = weight.shape[0], weight[0].numel()
            if spec.rank > min(rows, columns):
                raise RecipeError(
                    f"adapters: rank {spec.rank} is larger than {name!r}, which is {rows} x {columns}",
                    hint=f"give at most {min(rows, columns)}, or name other targets",
                )
            a = nn.Parameter(torch.empty(spec.rank, columns, dtype=weight.dtype, device=weight.device))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            # Zero, so that the training begins at the weights as they are.
            b = nn.Parameter(torch.zeros(rows, spec.rank, dtype=weight.dtype, device=weight.device))
            mask = by_parameter.get(id(weight))
            drop = None if mask is None else ~mask.to(weight.device).expand(weight.shape)
            # With a copy of W0: merged from it at every step, rounding cannot add up.
            self._parts.append((weight, weight.detach().clone(), a, b, drop))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [one for _, _, a, b, _ in self._parts for one in (a, b)]

    def take_gradients(self) -> None:
        """Turn the gradients of the weights into those of A and B."""
        for weight, _, a, b, drop in self._parts:
            if weight.grad is None:
                continue
            gradient = weight.grad if drop is None else weight.grad.masked_fill(drop, 0)
            flat = gradient.flatten(1) * self._scale
            a.grad, b.grad = b.detach().T @ flat, flat @ a.detach().T
            weight.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Merge: the weights become what they were plus the change, with every zero where it was."""
        for weight, first, a, b, drop in self._parts:
            change = (self._scale * (b @ a)).view_as(weight)
            weight.copy_(first + (change if drop is None else change.masked_fill(drop, 0)))


def _chosen(model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    layers = {
        f"{name}.weight".lstrip("."): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and isinstance(module.weight, nn.Parameter)
    }
    for pattern in spec.targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise RecipeError(
                f"adapters.targets: {pattern!r} names no weight of a linear layer or convolution",
                hint=suggestion(pattern, layers),
            )
    wanted = {n: w for n, w in layers.items() if any(fnmatchcase(n, pattern) for pattern in spec.targets)}
    return {name: weight for name, weight in wanted.items() if weight.requires_grad}
