"""What is done to a model, whatever was decided by which kind: cut slices, drop layers, write zeros.

Everything is named as in the model before the edit, also tensors of blocks that move up when others go. So one edit
says all, edits that follow each other become one (`planning.compose`), and it can be replayed onto a fresh model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import PlanMismatchError
from secateur.kinds.layers.drop import Layers, check_layers, drop_layers, new_names, stand_ins
from secateur.kinds.slices.cut import check, cut_copy, cut_model
from secateur.kinds.slices.fold import Scale, check_scales, rescale
from secateur.kinds.slices.momenta import require_own_state
from secateur.masks.units import Masks
from secateur.model.tensors import named_tensors
from secateur.structure.provenance import Attribute
from secateur.types import Cuts


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """A removal as data.

    Args:
        cuts: tensor name -> dimension -> kept indices, int64, ascending.
        attributes: integers on modules and configs -> their new value.
        layers: path of a stack -> which of its blocks go, and which lists are shortened alike.
        masks: parameter name -> bool tensor, True = keep; written on what the cuts leave.
        sizes: integers on modules and configs that say what the slices mean (how many heads a width holds) -> their
            value before the edit.
        scales: factors on what is left, so that a scale that the code takes from a width stays what it was.
        weights: parameter name -> new values of what the cuts leave; masks are written on top of them.
    """

    cuts: Cuts = field(default_factory=dict)
    attributes: Mapping[Attribute, int] = field(default_factory=dict)
    layers: Layers = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    sizes: Mapping[Attribute, int] = field(default_factory=dict)
    scales: Sequence[Scale] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def removes(self) -> bool:
        """Whether something goes physically, which needs a certificate."""
        return bool(self.cuts or self.layers)

    def check(self, model: nn.Module) -> None:
        """Refuse an edit that does not fit.

        Raises:
            PlanMismatchError: names the tensor, stack or list and what does not fit.
        """
        tensors = named_tensors(model)
        check(tensors, self.cuts)
        check_scales(tensors, self.scales)
        check_layers(model, self.layers)
        if self.masks or self.weights:
            first_names = {id(tensor): name for name, tensor in tensors.items()}
            self._check_shapes(model, first_names, "masks", self.masks)
            self._check_shapes(model, first_names, "moves", self.weights)

    def _check_shapes(
        self, model: nn.Module, first_names: Mapping[int, str], verb: str, tensors: Mapping[str, Tensor]
    ) -> None:
        """Masks and new values belong to parameters, under any of their names, in the shape that the cuts leave."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        noun = "mask" if verb == "masks" else "value"
        for name, mask in tensors.items():
            if name not in parameters:
                raise PlanMismatchError(f"The plan {verb} {name!r}, which this model does not have.")
            shape = list(parameters[name].shape)
            for d, kept in self.cuts.get(first_names[id(parameters[name])], {}).items():
                shape[d] = len(kept)
            if list(mask.shape) != shape:
                raise PlanMismatchError(f"The plan's {noun} of {name!r} is {list(mask.shape)}; here it is {shape}.")

    def copy(self, model: nn.Module) -> nn.Module:
        """A new model without what goes, not yet masked; what goes is never copied.

        Raises:
            PlanMismatchError: the edit does not fit; `model` is never changed.
        """
        self.check(model)
        if not self.layers:
            result = cut_copy(model, self.cuts, self.attributes)
            rescale(named_tensors(result), self.scales, self.cuts)
            return result
        # Without the integers: they are named as before the blocks move up, and `drop_layers` knows when to set them.
        result = cut_copy(model, self.cuts, {}, stand_ins(model, self.layers))
        rescale(named_tensors(result), self.scales, self.cuts)
        drop_layers(result, self.layers, self.attributes)
        return result

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Remove in place; parameters keep their identity, the optimizer's state follows. Masks are not written.

        Raises:
            PlanMismatchError: the edit does not fit; the model is unchanged.
            UnsupportedError: the state of the optimizer cannot follow; nothing was changed.
        """
        self.check(model)
        if optimizer is not None:
            require_own_state(model, optimizer, self.cuts)
        if self.cuts or not self.layers:
            cut_model(model, self.cuts, {} if self.layers else self.attributes, optimizer)
            if self.scales:
                rescale(named_tensors(model), self.scales, self.cuts)
        if self.layers:
            drop_layers(model, self.layers, self.attributes, optimizer)

    def masks_after(self, model: nn.Module) -> dict[str, Tensor]:
        """The masks under the names that their parameters have once layers are gone.

        Args:
            model: as it is before the edit.
        """
        name_after = new_names(model, self.layers)
        renamed = ((name_after(name), mask) for name, mask in self.masks.items())
        return {name: mask for name, mask in renamed if name is not None}

    def weights_after(self, model: nn.Module) -> dict[str, Tensor]:
        """The new values under the names that their parameters have once layers are gone.

        Args:
            model: as it is before the edit.
        """
        name_after = new_names(model, self.layers)
        renamed = ((name_after(name), value) for name, value in self.weights.items())
        return {name: value for name, value in renamed if name is not None}


def write_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give parameters new values, in place; dtype and device stay."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
