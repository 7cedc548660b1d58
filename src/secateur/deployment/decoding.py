"""Models that write a text token by token: what a step of theirs is called with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from secateur.types import Example

TOKENS = "input_ids"


def step_of(model: nn.Module, example: Example) -> Example:
    """The example of one step of `generate`: one token per text; any other model's example stays as it is.

    Nearly all the time of writing goes into such steps, and what is fast for one token need not be for a whole prompt.

    Args:
        model: a causal language model of transformers, or any other model.
        example: what `secateur.model.call.call` takes.
    """
    if not writes(model):
        return example
    if isinstance(example, Mapping):
        tokens = example.get(TOKENS)
        return {TOKENS: tokens[:, :1]} if isinstance(tokens, Tensor) and tokens.dim() == 2 else example
    first = example[0] if isinstance(example, tuple) and example else example
    return first[:, :1] if isinstance(first, Tensor) and first.dim() == 2 and not first.is_floating_point() else example


def writes(model: nn.Module) -> bool:
    """Whether `model.generate` goes on from its own tokens; an encoder with a decoder is called otherwise."""
    able, config = getattr(model, "can_generate", None), getattr(model, "config", None)
    return callable(able) and bool(able()) and not getattr(config, "is_encoder_decoder", False)
