"""Encoders of torch that pack padded batches into nested tensors: they ask for an even number of heads.

`nn.TransformerEncoder` decides when it is made, and its layers fail later, once an odd number is left. The proofs run
without fused kernels, so they do not come by here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from secateur.errors import SecateurError, UnsupportedError
from secateur.model.call import call
from secateur.model.guard import guard
from secateur.types import Certificate, Example

HINT = "Keep an even number of heads (round_to=2), or set use_nested_tensor=False of the encoder before planning."


def with_padding(
    proof: Certificate, whole: nn.Module, cut: nn.Module, examples: Sequence[Example], *, meta: bool
) -> Certificate:
    """A certificate that says where padded batches would fail.

    Args:
        proof: of the cut.
        whole: the original.
        cut: the smaller model.
        examples: what it has to run on as it will be used.
        meta: whether nothing can be run.

    Raises:
        UnsupportedError: the cut model fails on an example that the original takes.

    Cost: nothing, unless an odd number of heads is left; then one forward pass of each per example.
    """
    odd = list(_odd(whole, cut))
    if not odd:
        return proof
    for example in () if meta else examples:
        if not _failure(whole, example) and (why := _failure(cut, example)):
            text = f"{', '.join(odd)} would keep an odd number of heads, and fails on padded batches."
            raise UnsupportedError(text, why=why, hint=f"{HINT} Nothing was changed or saved.")
    names = ", ".join(odd)
    note = f"holds without src_key_padding_mask: {names} keeps an odd number of heads, which nested tensors refuse"
    return replace(proof, notes=(*proof.notes, note))


def _odd(whole: nn.Module, cut: nn.Module) -> Iterator[str]:
    modules = dict(cut.named_modules())
    for path, module in whole.named_modules():
        other = modules.get(path)
        if isinstance(module, nn.TransformerEncoder) and isinstance(other, nn.TransformerEncoder):
            packs = getattr(other, "use_nested_tensor", False) and getattr(module, "use_nested_tensor", False)
            if packs and any(n % 2 for n in _heads(other)) and not any(n % 2 for n in _heads(module)):
                yield path or type(module).__name__


def _heads(encoder: nn.TransformerEncoder) -> list[int]:
    return [module.num_heads for module in encoder.modules() if isinstance(module, nn.MultiheadAttention)]


def _failure(model: nn.Module, example: Example) -> str:
    """What a model fails with as it is used for inference; "" where it runs."""
    try:
        with warnings.catch_warnings(), guard(model, mode="eval", gradients=False, example=example):
            warnings.simplefilter("ignore")  # the user's own runs say them
            call(model, example)
    except SecateurError as error:
        return error.why or error.what
    return ""
