"""The original's own tensors as a replay reads them: what goes is NaN; what a product leaves out is not copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.kinds.slices.unmade import SameSlices
from secateur.model.agreement import require_kept, require_slices
from secateur.model.tensors import can_be_nan
from secateur.structure.axes import Axis, Keep, kept, resolve, touched
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Axes, Op, Ref, Step, Trace, numbers_in

REORDERS = frozenset(["t", "transpose", "permute", "detach", "alias"])  # what changes the order of dimensions at most


@dataclass(frozen=True, eq=False, slots=True)
class Positions:
    """Which positions of a dimension stay: as a mask, and as ascending indices."""

    mask: npt.NDArray[np.bool_]
    stay: Tensor
    go: Tensor


class KeptSlices:
    """Which positions of dimensions stay.

    Args:
        keep: atom id -> bool array, True = kept; absent atoms are whole.
    """

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.cut = {i for i, mask in keep.items() if not mask.all()}
        self.counts = {i: int(mask.sum()) for i, mask in keep.items()}
        # By id of the axis, which is held beside the answer so that no other object gets its id. The same few
        # dimensions are asked about at every step.
        self._known: dict[int, tuple[Axis, Positions | None]] = {}

    def __call__(self, axis: Axis) -> Positions | None:
        """Positions of a dimension; None where all stay."""
        axis = resolve(axis)
        found = self._known.get(id(axis))
        if found is None:
            found = self._known[id(axis)] = (axis, self._positions(axis))
        return found[1]

    def _positions(self, axis: Axis) -> Positions | None:
        if not touched(axis, self.cut):
            return None
        mask = kept(axis, self.keep)
        return Positions(mask, torch.from_numpy(np.flatnonzero(mask)), torch.from_numpy(np.flatnonzero(~mask)))


@dataclass(frozen=True, slots=True)
class StoredView:
    """A parameter or buffer with its dimensions in some order: dimension i is dimension `dims[i]` of the tensor."""

    name: str
    dims: tuple[int, ...]


class Originals:
    """The parameters and buffers of the original.

    Args:
        trace: the run of the original model.
        tensors: its parameters and buffers by name.
        kept: what stays.
        cut: those of the cut model, to be compared; None compares nothing.
        same: those of the cut model that were compared already.
    """

    def __init__(
        self,
        trace: Trace,
        tensors: Mapping[str, Tensor],
        kept: KeptSlices,
        cut: Mapping[str, Tensor] | None = None,
        same: SameSlices | None = None,
    ) -> None:
        self.tensors, self.kept, self.cut, self.same = tensors, kept, cut, same
        self.axes: dict[str, Axes] = trace.tensors()
        self.views = _views(trace)
        self.compared: set[str] = set()  # names whose kept slices were seen to be those of the cut model

    def whole(self, view: StoredView) -> Tensor:
        """A copy of a tensor with NaN wherever something goes."""
        return self._poisoned(self.tensors[view.name].detach().clone(), view.name, {}).permute(view.dims)

    def rows(self, view: StoredView, rows: Tensor) -> Tensor:
        """As `whole`, of some rows only."""
        chosen = self.tensors[view.name].detach().index_select(0, rows)
        return self._poisoned(chosen, view.name, {0: rows})

    def factor(self, view: StoredView, summed: int, axis: Axis, free: int) -> Tensor:
        """A weight as one factor of a product, without what the product leaves out and what comes out as NaN anyway.

        Args:
            view: the weight.
            summed: the dimension that the product sums over.
            axis: what the product takes this dimension for.
            free: the dimension that the result inherits; the weight's own axis says what goes.

        Returns:
            the weight without the summed positions that `axis` leaves out and without its own removed positions
            along `free`; NaN where something else of it goes. Not to be written to.

        Raises:
            CertificateError: the cut model holds other numbers in the place of this weight.
        """
        axes = self.axes[view.name]
        wanted = {view.dims[summed]: self.kept(axis), view.dims[free]: self.kept(axes[view.dims[free]])}
        picks = {d: positions.stay for d, positions in sorted(wanted.items()) if positions is not None}
        same = self._of_the_cut(view.name, picks)
        if same is not None:
            return self._poisoned(same, view.name, picks).permute(view.dims)
        small = self.tensors[view.name].detach()
        for d, stay in picks.items():
            small = small.index_select(d, stay.to(small.device))
        if self.cut is not None and view.name not in self.compared and self._is_the_cut(axes, picks):
            require_slices(view.name, small, self.cut.get(view.name))
            self.compared.add(view.name)
        return self._poisoned(small, view.name, picks).permute(view.dims)

    def _of_the_cut(self, name: str, picks: Mapping[int, Tensor]) -> Tensor | None:
        """What these picks give, where the cut model was seen to hold exactly that."""
        if self.same is None or self.cut is None:
            return None
        kept = self.same.cuts.get(name, {})
        if not kept or kept.keys() != picks.keys() or not all(torch.equal(picks[d], kept[d]) for d in kept):
            return None
        found = self.same.small(name)
        if found is not None and self._is_the_cut(self.axes[name], picks):
            self.compared.add(name)
        return found

    def _is_the_cut(self, axes: Axes, picks: Mapping[int, Tensor]) -> bool:
        """Whether these picks are, dimension by dimension, what the plan keeps of the tensor."""
        own = [self.kept(axis) for axis in axes]
        return all(
            (positions is None and d not in picks)
            or (positions is not None and d in picks and torch.equal(picks[d], positions.stay))
            for d, positions in enumerate(own)
        )

    def _poisoned(self, tensor: Tensor, name: str, picks: Mapping[int, Tensor]) -> Tensor:
        """`tensor` with NaN at what goes; of a dimension in `picks` it holds these positions only."""
        if not can_be_nan(tensor):
            return tensor
        for d, axis in enumerate(self.axes[name]):
            positions = self.kept(axis)
            if positions is None:
                continue
            # A pick was made by what some call takes the dimension for. Where that is wrong, removed positions of
            # the tensor are among the picked ones, and must poison the result.
            gone = torch.from_numpy(np.flatnonzero(~positions.mask[picks[d].cpu()])) if d in picks else positions.go
            if len(gone):
                tensor = tensor.index_fill(d, gone.to(tensor.device), float("nan"))
        return tensor

    def require_the_rest(self) -> None:
        """Every tensor of the cut model holds exactly the kept slices: also where no product has compared it.

        Raises:
            CertificateError: one does not.
        """
        for name, axes in self.axes.items():
            if name in self.compared or all(self.kept(axis) is None for axis in axes):
                continue
            dims = {d: positions.stay for d, axis in enumerate(axes) if (positions := self.kept(axis)) is not None}
            require_kept(name, self.tensors[name], dims, None if self.cut is None else self.cut.get(name))


def kept_only(tensor: Tensor, axes: Axes, kept: KeptSlices) -> Tensor:
    """The kept coordinates of a tensor."""
    for d, axis in enumerate(axes):
        positions = kept(axis)
        if positions is not None:
            tensor = tensor.index_select(d, positions.stay.to(tensor.device))
    return tensor


def _views(trace: Trace) -> dict[int, StoredView]:
    """Tensor number -> which parameter or buffer it is, of those that nothing in the run writes to."""
    found = {number: StoredView(name, tuple(range(len(trace.axes[number])))) for number, name in trace.names.items()}
    below = dict(trace.names)  # every tensor that shares memory with a parameter or buffer
    written: set[str] = set()
    for step in trace.steps:
        first = step.args[0] if step.args else None
        source = below.get(first.number) if isinstance(first, Ref) else None
        if step.func._schema.is_mutable:
            written |= {below[n] for n in _written(step) if n in below}
        elif source is not None and _shares(step.func):
            below.update(dict.fromkeys(step.outputs, source))
            assert isinstance(first, Ref)
            if base_name(step.func) in REORDERS and first.number in found:
                before = found[first.number]
                found[step.outputs[0]] = StoredView(before.name, tuple(before.dims[d] for d in _order(step, before)))
    return {number: view for number, view in found.items() if view.name not in written}


def _shares(func: Op) -> bool:
    """Whether the results are views of the first argument."""
    return func._schema.arguments[0].alias_info is not None


def _written(step: Step) -> list[int]:
    """Tensors that an in-place call changes."""
    found: list[int] = []
    for i, argument in enumerate(step.func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = step.args[i] if i < len(step.args) else step.kwargs.get(argument.name)
            found += numbers_in(value)
    return found


def _order(step: Step, view: StoredView) -> list[int]:
    """Where each dimension of the result comes from: the operator itself says so, on a tensor with marked sizes."""
    marked = torch.empty([d + 2 for d in range(len(view.dims))], device="meta")
    return [n - 2 for n in step.func(marked, *step.args[1:], **step.kwargs).shape]
