"""Labels in a batch that is a mapping, and whether a forward takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from secateur.types import Batch

LABEL_KEYS = ("labels", "label", "label_ids", "targets", "target", "y")
ANY_NAME = "**"


def own_loss(output: object) -> Tensor | None:
    """The loss that a model returned beside its outputs, as Hugging Face models do; None where there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def takes_labels(model: nn.Module, batch: Batch) -> bool:
    """Whether the batch is a mapping with labels that the forward takes by name."""
    return isinstance(batch, Mapping) and any(key in LABEL_KEYS and _takes(model, key) for key in batch)


def with_labels(model: nn.Module, batch: Mapping[str, object]) -> dict[str, object]:
    """The batch as the forward takes it: labels go along under the names that it knows, and else stay out."""
    return {key: value for key, value in batch.items() if key not in LABEL_KEYS or _takes(model, key)}


def _takes(model: nn.Module, name: str) -> bool:
    names = argument_names(model)
    return name in names or ANY_NAME in names


def argument_names(model: nn.Module) -> set[str]:
    """Names of the forward's arguments; `ANY_NAME` where it takes any, or does not say."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        # A scripted forward has no signature: calling it will tell.
        return {ANY_NAME}
    return {ANY_NAME if p.kind is p.VAR_KEYWORD else name for name, p in parameters.items()}
