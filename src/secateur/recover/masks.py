"""Holding masks while an optimizer moves the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import InputError


class MaskHolder:
    """Keep masked weights at exactly +0.0 through any optimizer step.

    Zeroing the weights alone is not enough: momentum, weight decay and Adam's moments move them again, so
    gradients and the optimizer's state are masked too. Fills, not products: a NaN times zero is a NaN.

    Args:
        model: the model whose parameters the masks name.
        masks: parameter name -> bool, True = keep, of the parameter's shape. Several names of one tied
            parameter: an element is kept where every mask keeps it.

    Raises:
        InputError: unknown parameter, or a mask of another shape or dtype.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None) -> None:
        self._dropped: list[tuple[nn.Parameter, Tensor]] = []
        parameters = dict(model.named_parameters(remove_duplicate=False))
        dropped: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for name, mask in (masks or {}).items():
            if name not in parameters:
                raise InputError(f"there is a mask for {name!r}, but the model has no such parameter")
            parameter = parameters[name]
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise InputError(
                    f"the mask of {name!r} is {mask.dtype}{list(mask.shape)}",
                    why=f"the parameter is {list(parameter.shape)}; a mask is bool, True = keep",
                )
            drop = ~mask.to(parameter.device)
            if id(parameter) in dropped:
                drop = drop | dropped[id(parameter)][1]
            dropped[id(parameter)] = (parameter, drop)
        self._dropped = list(dropped.values())

    def mask_weights(self) -> None:
        """Write +0.0 into every masked weight."""
        with torch.no_grad():
            for parameter, drop in self._dropped:
                parameter.masked_fill_(drop, 0.0)

    def mask_gradients(self) -> None:
        """Write 0 into every masked gradient; before the step."""
        for parameter, drop in self._dropped:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(drop, 0.0)

    def mask_state(self, optimizer: Optimizer) -> None:
        """Write 0 into every state tensor of a parameter's shape (moments, momentum) at the masked places."""
        for parameter, drop in self._dropped:
            for key, value in optimizer.state.get(parameter, {}).items():
                # The step counter of a scalar parameter has the parameter's shape, yet is no moment.
                if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(drop, 0)
