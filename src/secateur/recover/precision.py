"""Mixed precision: forward and loss in bfloat16, weights and optimizer as they are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError, UnsupportedError
from secateur.types import Batch, Loss

Amp = Literal["bf16"]


def in_precision(loss: Loss, amp: Amp | None, device: torch.device) -> Loss:
    """The loss, run under autocast where mixed precision is asked for.

    bfloat16 has the range of float32, so no scaling of the loss is needed; float16 would need it.

    Args:
        loss: ``loss(model, batch) -> scalar``.
        amp: "bf16", or None for the precision of the weights.
        device: of the model.

    Raises:
        RecipeError: another word.
        UnsupportedError: the device has no autocast in bfloat16.
    """
    if amp is None:
        return loss
    if amp != "bf16":
        raise RecipeError(f"amp: {amp!r} is not known", hint="bf16, or leave it out")
    if not torch.amp.is_autocast_available(device.type):
        raise UnsupportedError(f"there is no mixed precision on {device.type}", hint="leave amp out")

    def inside(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return loss(model, batch)

    return inside
