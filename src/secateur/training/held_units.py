"""Decisions about units, held as masks in weights, optimizers and averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import InputError
from secateur.masks import expand, mask_model
from secateur.masks.hold import mask_weights, moved_by
from secateur.planning.averages import Averages, averaged_module, require_averages
from secateur.types import Group


class Held:
    """Which units stay, changed from time to time.

    Args:
        model: masked in place.
        groups: the units.
        optimizers: hold the masks.
        ema: averages of weights, zero where these are.
        keep_originals: whether values under masks are kept, for methods that bring them back.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        optimizers: Sequence[Optimizer],
        ema: Averages | None,
        *,
        keep_originals: bool,
    ) -> None:
        self.groups = {group.name: group for group in groups}
        self.keep: dict[str, Tensor] = {}
        require_averages(model, ema)
        self.handle = mask_model(model, {}, keep_originals=keep_originals)
        self._ema, self._optimizers = ema, list(optimizers)
        self._unheld: list[str] = []
        for optimizer in optimizers:
            self.handle.hold(optimizer)

    def removed(self) -> tuple[int, int]:
        """Units that are masked, and all."""
        gone = sum(mask.numel() - int(mask.sum()) for mask in self.keep.values())
        return gone, sum(group.size for group in self.groups.values())

    def hold(self, keep: Mapping[str, Tensor], *, back: bool = False) -> None:
        """Take over a decision.

        Args:
            keep: group name -> bool, True = the unit stays.
            back: whether weights that come back have the values from when they were masked, rather than 0.
        """
        self.keep = dict(keep)
        self.hold_masks(expand(list(self.groups.values()), self.keep, model=self.handle.model), back=back)

    def hold_masks(self, masks: Mapping[str, Tensor], *, back: bool) -> None:
        """As `hold`, from masks of tensors."""
        self.handle.update(masks, regrow="remembered" if back else "zero")
        moved = {key for optimizer in self._optimizers for key in moved_by(optimizer)}
        self._unheld = [name for name in masks if id(self.handle.model.get_parameter(name)) not in moved]
        _zero_averages(self._ema, masks)

    def enforce(self) -> None:
        """Write the zeros again."""
        self.handle.enforce()
        _zero_averages(self._ema, self.handle.masks)

    def enforce_unheld(self) -> None:
        """Write the zeros again where none of the optimizers moves the weight: nobody holds them there.

        A loop may move them by an optimizer that it does not tell of; weights that are frozen stay as they are.
        """
        if not self._unheld:
            return
        masks = {name: mask for name, mask in self.handle.masks.items() if name in self._unheld}
        found = ((self.handle.model.get_parameter(name), mask) for name, mask in masks.items())
        mask_weights((parameter, ~mask.to(parameter.device)) for parameter, mask in found)
        _zero_averages(self._ema, masks)

    def state_dict(self) -> dict[str, object]:
        """The units that stay, and the values under the masks where they are stored."""
        return {"keep": dict(self.keep), "handle": self.handle.state_dict() if self.handle.keep_originals else {}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Mask as the checkpoint was masked.

        Raises:
            InputError: it is no state of masks of this model.
        """
        keep, handle = state.get("keep"), state.get("handle", {})
        if not isinstance(keep, Mapping) or not isinstance(handle, Mapping) or not keep.keys() <= self.groups.keys():
            raise InputError("this is no state of masks of this model", hint="give what state_dict() returned")
        if not keep:
            return
        self.hold({name: mask.to(self._device(name)) for name, mask in keep.items()})
        if self.handle.keep_originals:
            self.handle.load_state_dict(handle)

    def _device(self, name: str) -> torch.device:
        return self.handle.model.get_parameter(self.groups[name].spans[0].tensor).device


def _zero_averages(ema: Averages | None, masks: Mapping[str, Tensor]) -> None:
    """Write +0.0 into averages of masked weights: an average remembers for long what was there."""
    if ema is None:
        return
    inner = averaged_module(ema)
    averages = ema if inner is None else dict(inner.named_parameters())
    assert isinstance(averages, Mapping)
    with torch.no_grad():
        for name, keep in masks.items():
            if name in averages:
                averages[name].masked_fill_(~keep.to(averages[name].device), 0.0)
