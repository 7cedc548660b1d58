"""How a language model goes on from a prompt: what a reader understands of a perplexity."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.model.call import device_of
from secateur.model.guard import evaluating
from secateur.model.longest import context_length

PROMPT, LENGTH = 24, 24


@runtime_checkable
class Generates(Protocol):
    """A model of transformers that writes text."""

    def generate(self, input_ids: Tensor, **options: object) -> Tensor:
        """Token numbers, prompt and continuation, [batch, tokens]."""


def continuation(model: nn.Module, prompt: Tensor, *, length: int = LENGTH) -> Tensor | None:
    """The likeliest next tokens, one after the other, without chance.

    Args:
        model: left as it is.
        prompt: token numbers [tokens].
        length: tokens to add at most; fewer where the model was made for no more.

    Returns:
        the tokens behind the prompt; None where the model cannot generate, or has no room behind the prompt.

    Cost: one forward pass over the prompt, and one for each further token.
    """
    if not isinstance(model, Generates) or not getattr(model, "can_generate", lambda: True)():
        return None
    longest = context_length(getattr(model, "config", None))
    room = length if longest is None else min(length, longest - len(prompt))
    if room < 1:
        return None
    ids = prompt[None].to(device_of(model))
    end = getattr(getattr(model, "config", None), "eos_token_id", None)
    end = end[0] if isinstance(end, list) and end else end
    # Settings of the model's own (a temperature, a longest length) would only be warned about.
    plain = {"do_sample": False, "max_new_tokens": room, "min_new_tokens": 1, "num_beams": 1}
    with evaluating(model):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=end, **plain)
    return found[0, len(prompt) :].cpu()
