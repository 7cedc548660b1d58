"""Padding: which tokens of a batch are real, and activations without the others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from secateur.errors import InputError
from secateur.types import Example

DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")


def real_tokens(example: Example) -> Tensor | None:
    """Which tokens of a batch are no padding, bool [batch, tokens]; None where all are, or nothing says.

    Args:
        example: what `secateur.model.call.call` takes; only mappings have an `attention_mask` [batch, tokens]. Where
            a decoder reads as many tokens, activations do not tell whose they are, and nothing is left out.

    Raises:
        InputError: no token is real.
    """
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    if not isinstance(example, Mapping) or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    others = [value for key in DECODER if isinstance(value := example.get(key), Tensor)]
    real = mask != 0
    if mask.numel() and not bool(real.any()):
        raise InputError(
            f"attention_mask {list(mask.shape)} leaves out every token of a batch", hint="1 is a token, 0 is padding"
        )
    if bool(real.all()) or any(other.shape[:2] == mask.shape for other in others):
        return None
    return real


def without_padding(value: Tensor, real: Tensor | None) -> Tensor:
    """The rows of real tokens, [rows, width]; the same tensor where it has no row for each token, or nothing is padded.

    Args:
        value: [batch, tokens, width] or [batch * tokens, width]; other forms stay as they are.
        real: as `real_tokens` gives it.
    """
    if real is None or not holds_tokens(value, real):
        return value
    return value.flatten(0, -2)[real.flatten().to(value.device)]


def holds_tokens(value: Tensor, real: Tensor) -> bool:
    """Whether an activation is [batch, tokens, width] or [batch * tokens, width]."""
    return (value.dim() == 3 and value.shape[:2] == real.shape) or (value.dim() == 2 and len(value) == real.numel())
