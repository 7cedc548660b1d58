"""Perplexity of causal language models, by one fixed harness, so that figures can be compared.

The text is turned into tokens at one go, with whatever marks the tokenizer adds to a whole text (none in between), and
cut into blocks of equal length without overlap; the rest at the end is dropped. Every block is read from its start
without context; the first token of each is context only. The model runs in the dtype that it has; its logits are
compared in float32. Perplexity is exp of the mean over all tokens that were predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import InputError, NonFiniteError, UnsupportedError
from secateur.model.call import call, device_of, prediction, to_device, to_example
from secateur.model.guard import evaluating
from secateur.model.labels import own_loss, with_labels
from secateur.model.padding import real_tokens
from secateur.types import Batch, Data

IGNORED = -100  # label of tokens that nobody asks for, as transformers has it


def perplexity(model: nn.Module, data: Data) -> dict[str, float]:
    """Mean loss per token and its exponential.

    Args:
        model: gives logits [batch, tokens, vocabulary] for ``input_ids``.
        data: batches with `input_ids` and, where tokens are to be left out, `labels` (-100) or `attention_mask`.

    Returns:
        {"loss": mean negative log-likelihood, "perplexity": its exponential}.

    Raises:
        InputError: no token to predict.
        NonFiniteError: the loss is NaN or Inf.

    Cost: one forward pass over the data.
    """
    total, count, device = 0.0, 0, device_of(model)
    with evaluating(model):
        for batch in data:
            moved = to_device(batch, device)
            labels = _labels(moved)
            logits = prediction(call(model, to_example(moved)))
            loss, tokens = _loss(logits, labels)
            total, count = total + loss, count + tokens
    if not count:
        raise InputError("there is no token to predict", hint="give longer text")
    mean = total / count
    if not math.isfinite(mean):
        raise NonFiniteError(f"the loss of the model is {mean}")
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}


def predicts_next(model: nn.Module, batch: Batch) -> bool:
    """Whether a model is asked for the next token.

    Its labels are its input, what it says of a token does not depend on those behind, and its own loss is the mean over
    the tokens that follow.

    Args:
        model: left as it is.
        batch: one batch.

    Cost: three forward passes of one sample.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return False
    ids, labels = batch["input_ids"], batch.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != ids.shape or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    if not bool(((labels == ids) | (labels == IGNORED)).all()):
        return False
    few = {key: value[:1] if isinstance(value, Tensor) else value for key, value in batch.items()}
    moved = to_device(few, device_of(model))
    with evaluating(model):
        output = call(model, with_labels(model, moved))
        own, logits = own_loss(output), prediction(output)
        if own is None or logits.dim() != 3 or logits.shape[:2] != moved["input_ids"].shape:
            return False
    if sees_later(model, few):
        return False
    loss, tokens = _loss(logits, _labels(moved))
    return tokens > 0 and math.isclose(float(own), loss / tokens, rel_tol=1e-2, abs_tol=1e-3)


def sees_later(model: nn.Module, batch: Mapping[str, object]) -> bool:
    """Whether what a model says of a token depends on those behind it, so that none is left to predict.

    Args:
        model: gives logits [batch, tokens, vocabulary]; left as it is.
        batch: `input_ids` [batch, tokens] of at least two tokens, and what else the model takes.

    Cost: two forward passes of one sample.
    """
    few = {key: value[:1] if isinstance(value, Tensor) else value for key, value in batch.items()}
    moved = to_device(few, device_of(model))
    real = real_tokens(moved)
    # Behind padding nothing would show: the last token that is none.
    last = moved["input_ids"].shape[1] - 1 if real is None else int(real[0].nonzero()[-1])
    with evaluating(model):
        first = prediction(call(model, to_example(moved)))
        changed = moved["input_ids"].clone()
        changed[:, last] = (changed[:, last] + 1) % first.shape[-1]
        second = prediction(call(model, to_example({**moved, "input_ids": changed})))
    before, after = first[:, :last], second[:, :last]
    if real is not None:
        before, after = before[real[:, :last]], after[real[:, :last]]
    if not before.numel():
        return False
    # The same numbers go through the same kernels: in single precision there is no difference at all, as a rule.
    least = min(100 * torch.finfo(before.dtype).eps, 1e-3)
    return float((before.float() - after.float()).abs().max()) > least * float(before.float().abs().max())


def require_next(model: nn.Module, data: Data) -> None:
    """Refuse a model that sees the tokens that perplexity asks it for.

    Args:
        model: left as it is.
        data: batches, of which the first is looked at.

    Raises:
        UnsupportedError: it does.
    """
    batch = next(iter(data), None)
    if isinstance(batch, Mapping) and sees_later(model, batch):
        raise UnsupportedError(
            f"{type(model).__name__} does not predict the next token: what it says of one depends on those behind it.",
            why="a perplexity would be that of a text which it is shown",
            hint="Measure models of masked tokens by a metric of their task: secateur measure --data ... --metric ...",
        )


def _labels(batch: Batch) -> Tensor:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise InputError("perplexity needs batches with input_ids", hint="for example --data text:FILE")
    ids = batch["input_ids"]
    labels = batch.get("labels")
    labels = labels if isinstance(labels, Tensor) else ids
    mask = batch.get("attention_mask")
    return labels if not isinstance(mask, Tensor) else labels.masked_fill(mask == 0, IGNORED)


def _loss(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Summed loss and number of the tokens that are predicted."""
    total, count = 0.0, 0
    # One sequence at a time: logits in float32 are the largest tensor of the whole run.
    for scores, wanted in zip(logits, labels, strict=True):
        found = F.cross_entropy(scores[:-1].float(), wanted[1:], ignore_index=IGNORED, reduction="sum")
        total, count = total + float(found), count + int((wanted[1:] != IGNORED).sum())
    return total, count


def with_dtype(model: nn.Module, dtype: str | None) -> nn.Module:
    """The model cast to a dtype, in place; None leaves it as it is."""
    return model if dtype is None else model.to(getattr(torch, dtype))
