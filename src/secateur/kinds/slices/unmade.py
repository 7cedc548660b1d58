"""Weights of which slices are missing, made only where somebody reads them.

Most weights serve as a factor of a product and nothing else, and a product takes what is there and leaves the missing
rest out: the copy of the whole weight with NaN in it would never be read. And what a product takes is, where the cut
model was seen to hold the same bits, the cut model's own weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError
from secateur.model.agreement import require_kept
from secateur.model.memory import memory_of
from secateur.model.tensors import has_values, named_tensors

Dims = Mapping[int, Tensor]
VIEWS = frozenset(["t", "detach", "alias"])  # of a weight that is not made, these are not made either
LEAN = {"mm": 1, "addmm": 2, "linear": 1, "convolution": 1}  # products that take a weight in parts: where it stands


class SameSlices:
    """Tensors of a cut model that hold, bit for bit, the kept slices of the original.

    Args:
        model: the original.
        cut: the smaller model.
        cuts: tensor name -> dimension -> kept indices.
        apart: names of tensors that are not expected to: their values were changed on purpose.
    """

    def __init__(
        self, model: nn.Module, cut: nn.Module, cuts: Mapping[str, Dims], apart: frozenset[str] = frozenset()
    ) -> None:
        self.model, self.cuts = model, cuts
        self._whole, self._small = named_tensors(model), named_tensors(cut)
        self._apart = apart
        self._seen: dict[str, Tensor | None] = {}
        self._dropped = False

    def small(self, name: str) -> Tensor | None:
        """The cut model's tensor, not to be written to; None where it was not seen to be the same.

        Cost: one walk over the tensor, once.
        """
        if self._dropped or name not in self.cuts or name in self._apart:
            return None
        if name not in self._seen:
            self._seen[name] = self._compared(name)
        return self._seen[name]

    def drop(self) -> None:
        """Believe none of them any longer: a forward writes to weights, so what was seen may not hold."""
        self._dropped = True

    def _compared(self, name: str) -> Tensor | None:
        found = self._small.get(name)
        try:
            require_kept(name, self._whole[name], self.cuts[name], found)
        except CertificateError:
            return None  # for the proofs to find
        return None if found is None else found.detach()  # a handle on the memory that was seen


def nobody() -> Tensor | None:
    """Where no cut model has the weight."""
    return None


@dataclass(eq=False)
class Unmade:
    """A weight whose missing slices are not yet NaN.

    Args:
        tensor: stands for it in the model that runs, in the memory of the whole weight.
        make: gives a copy of which the missing slices are NaN.
        kept: dimension -> positions that are there.
        small: gives the weight at these positions, or None where nobody has it.
    """

    tensor: Tensor
    make: Callable[[], Tensor]
    kept: Dims
    small: Callable[[], Tensor | None] = nobody
    written: bool = False  # from then on the copy is what there is
    _made: Tensor | None = field(default=None, repr=False)

    def made(self) -> Tensor:
        """The copy."""
        if self._made is None:
            self._made = self.make().detach()
        return self._made

    def view(self, of: Tensor) -> Tensor:
        """The copy in the form of a view of the weight."""
        made = self.made()
        return made if _form(of) == _form(self.tensor) else made.as_strided(of.shape, of.stride(), of.storage_offset())

    def taken(self, view: Tensor, picks: Dims) -> Tensor | None:
        """The weight, or its transpose, at exactly the positions that are there; None where nobody has that."""
        turned = _form(view) != _form(self.tensor)
        if turned and (view.dim() != 2 or _form(view.t()) != _form(self.tensor)):
            return None
        own = {1 - d if turned else d: positions for d, positions in picks.items()}
        if own.keys() != self.kept.keys() or not all(torch.equal(own[d], self.kept[d].to(own[d].device)) for d in own):
            return None
        small = self.small()
        return small.t() if small is not None and turned else small


def can_wait(tensors: Mapping[str, Tensor], cuts: Mapping[str, Dims]) -> list[str]:
    """Names of weights that need not be made: plain parameters, each alone in its memory and all of it."""
    users = Counter(memory_of(tensor) for tensor in tensors.values())
    return [
        name for name in cuts if name in tensors and _is_plain(tensors[name]) and users[memory_of(tensors[name])] == 1
    ]


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is nn.Parameter
        and has_values(tensor)
        and not tensor.is_inference()  # nothing may stand in for these outside of inference mode
        and tensor.is_floating_point()
        and tensor.dim() > 1
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
