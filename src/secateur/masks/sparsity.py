"""Counted zeros: of what was masked, and of the whole model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.masks.units import Masks, resolve


@dataclass(frozen=True)
class Sparsity:
    """Zeros, counted one by one; a tied parameter counts once.

    Nine tenths of what may be masked can be a fifth of the model, so both are told.

    Args:
        elements: elements of the masked parameters.
        masked: elements that the masks leave out.
        zeros: elements of the masked parameters that are zero now.
        model_elements: elements of all floating-point parameters of the model, those of norms and biases included.
        model_zeros: elements of these that are zero now.
    """

    elements: int
    masked: int
    zeros: int
    model_elements: int
    model_zeros: int

    @property
    def fraction(self) -> float:
        """Part of the masked parameters that the masks leave out, in [0, 1]."""
        return self.masked / self.elements if self.elements else 0.0

    @property
    def model_fraction(self) -> float:
        """Part of all weights of the model that is zero now, in [0, 1]."""
        return self.model_zeros / self.model_elements if self.model_elements else 0.0


def sparsity_of(model: nn.Module, masks: Masks) -> Sparsity:
    """Count what masks leave out and what is zero.

    Args:
        model: left as it is.
        masks: parameter name -> bool tensor as `mask_model` takes it, True = keep; may be empty.

    Raises:
        InputError: as `mask_model`.

    Cost:
        One pass over the weights; nothing of their size is held.
    """
    found = resolve(model, masks)
    # Integers are left out: what is stored in them (packed, quantised) is not a weight of zero where it is 0.
    zeros = {id(p): _zeros(p) for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    own = [(parameter, keep) for parameter, keep in found.values()]
    return Sparsity(
        elements=sum(parameter.numel() for parameter, _ in own),
        masked=sum(masked_elements(keep, parameter) for parameter, keep in own),
        zeros=sum(zeros.get(id(parameter), 0) for parameter, _ in own),
        model_elements=sum(p.numel() for p in model.parameters() if id(p) in zeros),
        model_zeros=sum(zeros.values()),
    )


def masked_elements(keep: Tensor, parameter: Tensor) -> int:
    """Elements of a parameter that a mask leaves out; a mask may be of size 1 in some dimensions."""
    if keep.numel() == 0:
        return 0
    return (keep.numel() - int(torch.count_nonzero(keep))) * (parameter.numel() // keep.numel())


def _zeros(parameter: Tensor) -> int:
    return parameter.numel() - int(torch.count_nonzero(parameter.detach()))
