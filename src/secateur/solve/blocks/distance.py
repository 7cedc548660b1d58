"""How far the outputs of a pruned model are from those of the original, on batches that nothing was learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.model.bypass import first_tensor
from secateur.model.call import call
from secateur.types import Example

CHUNK = 512  # rows of outputs at once: a vocabulary is wide


@torch.no_grad()
def distance(
    model: nn.Module, batches: Sequence[Example], masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> float:
    """Mean Kullback-Leibler divergence of the outputs, read as logits, from the original's.

    Args:
        model: the original; given back as it came.
        batches: to run both on.
        masks: parameter name -> True = keep.
        weights: parameter name -> new values; those without are multiplied by their mask.

    Cost: two forward passes per batch.
    """
    parameters = dict(model.named_parameters())
    total, rows = 0.0, 0
    for batch in batches:
        goal = _logits(model, batch)
        before = {name: parameters[name].detach().clone() for name in masks}
        try:
            for name, mask in masks.items():
                value = weights.get(name)
                kept = before[name] * mask.to(before[name].device) if value is None else value
                parameters[name].data.copy_(kept)
            found = _logits(model, batch)
        finally:
            for name, value in before.items():
                parameters[name].data.copy_(value)
        for a, b in zip(torch.split(goal, CHUNK), torch.split(found, CHUNK), strict=True):
            ours, theirs = (functional.log_softmax(one.float(), -1) for one in (b, a))
            total += float(functional.kl_div(ours, theirs, reduction="sum", log_target=True))
        rows += len(goal)
    return total / max(rows, 1)


def _logits(model: nn.Module, batch: Example) -> Tensor:
    """The first tensor of the outputs, as rows."""
    found = first_tensor(call(model, batch))
    assert found is not None
    return found.reshape(-1, found.shape[-1])
