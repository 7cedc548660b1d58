"""Zeros of earlier rounds stay zero while a model is trained once more, whatever is removed meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from secateur.masks.hold import Dropped, Hold, mask_weights
from secateur.planning.history import zeros_of


class EarlierZeros:
    """What the plans that led to a model have set to zero; follows cuts of the model.

    Args:
        model: that remembers them: pruned or loaded in this process.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = self._read()

    def __bool__(self) -> bool:
        return bool(self._known)

    def dropped(self) -> Iterable[Dropped]:
        """Parameters with zeros, each with a bool tensor of its shape, True = zero."""
        if any(parameter.shape != drop.shape for parameter, drop in self._known):
            # A plan that cuts in place leaves the model with the history of both rounds, in its new shapes.
            self._known = self._read()
        return ((parameter, drop.to(parameter.device)) for parameter, drop in self._known)

    def hold(self, optimizers: Iterable[Optimizer]) -> None:
        """Hold them through all steps of optimizers: an average that is taken right after a step sees zeros."""
        if self:
            for optimizer in optimizers:
                Hold(self, optimizer)

    def write(self) -> None:
        """Write them again: an optimizer that nobody told of may have moved them."""
        mask_weights(self.dropped())

    def _read(self) -> list[Dropped]:
        found = {name: (self._model.get_parameter(name), ~keep) for name, keep in zeros_of(self._model).items()}
        return list({id(parameter): (parameter, drop) for parameter, drop in found.values()}.values())
