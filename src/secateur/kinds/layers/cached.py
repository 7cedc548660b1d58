"""What a causal language model makes of a text token by token is what it makes of it at once, also without branches.

A cache of keys and values is asked how long it is, often in its first layer, and an attention that is gone fills none.
No forward pass without a cache shows that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError
from secateur.integrations.transformers import is_transformers
from secateur.model.agreement import TOLERANCE
from secateur.model.guard import evaluating
from secateur.types import Certificate, Example

MOST = 8  # tokens of the trial
LIMIT = 1e-3  # of the difference, relative to the largest logit; half precision may round further, in the original too
DIFFERS = "going on from its cache of keys and values the model answers otherwise than on the whole text at once"
NOT_TRIED = (
    "going on from a cache was not tried: that takes a decoder of transformers that agrees with its own cache, and an "
    "example of four token ids or more"
)


def short(model: nn.Module, example: Example) -> Callable[[nn.Module], str] | None:
    """A trial of a model with its cache on a few tokens; None where the original has none, or fails it itself.

    Args:
        model: the original.
        example: what `secateur.model.call.call` takes; its first tokens are used.

    Returns:
        model -> what is wrong with it, "" if nothing; to be called in eval mode.
    """
    tokens = _tokens(model, example)
    if tokens is None:
        return None
    with evaluating(model):
        own = _error(model, tokens)
    precision = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if own is None or own > max(LIMIT, TOLERANCE.get(precision, LIMIT)):
        return None

    def trial(given: nn.Module) -> str:
        error = _error(given, tokens)
        return "" if error is not None and error <= max(LIMIT, 4 * own) else DIFFERS

    return trial


def certify_cached(whole: nn.Module, cut: nn.Module, example: Example, proof: Certificate) -> Certificate:
    """The certificate, if a cut model also agrees with itself when it goes on from a cache; a note where none is tried.

    Raises:
        CertificateError: it does not, and the original does.
    """
    if not _causal(whole):
        return proof
    trial = short(whole, example)
    if trial is None:
        return replace(proof, notes=(*proof.notes, NOT_TRIED))
    with evaluating(cut):
        why = trial(cut)
    if why:
        raise CertificateError(
            "The model without these branches generates otherwise than it answers.",
            why=why,
            hint="Protect the first attention of each kind, in which the cache counts its tokens.",
        )
    return proof


def _causal(model: nn.Module) -> bool:
    """Whether it writes texts, as far as its methods say."""
    return callable(getattr(model, "generate", None))


def _tokens(model: nn.Module, example: Example) -> Tensor | None:
    if not is_transformers(model) or not _causal(model) or getattr(model.config, "is_encoder_decoder", False):
        return None
    ids = example.get("input_ids") if isinstance(example, Mapping) else example
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < 4:
        return None
    return ids[:1, :MOST]


@torch.no_grad()
def _error(model: nn.Module, ids: Tensor) -> float | None:
    """Largest difference of the last logits, relative to the largest; None where there is no cache, or it fails."""
    half = ids.shape[1] // 2
    try:
        at_once = model(input_ids=ids, use_cache=False).logits[:, half:].double()
        past = model(input_ids=ids[:, :half], use_cache=True).past_key_values
        if past is None:
            return None
        one = model(input_ids=ids[:, half : half + 1], past_key_values=past, use_cache=True)
        rest = model(input_ids=ids[:, half + 1 :], past_key_values=one.past_key_values, use_cache=True)
        found = torch.cat([one.logits, rest.logits], 1).double()
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return None
    return float((at_once - found).abs().max() / at_once.abs().max().clamp(min=1e-12))
