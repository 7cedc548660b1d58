"""The certificate: replay the recorded calls with the removed parts left out, and compare with the cut model.

The original weights go through the original calls at full size. What was removed is NaN, so a slice that is read by
mistake poisons the result. Sums leave removed positions out; operations that mix a dimension (norms, softmax, means)
run on the kept coordinates only. Whatever the cut model returns must agree at every kept coordinate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import CertificateError
from secateur.kinds.slices.numbers import Entry, NumberTape, align, numbers
from secateur.model.agreement import agreement, doubled, require_slices, run_cut
from secateur.model.call import outputs
from secateur.model.tensors import named_tensors
from secateur.structure.axes import Axis, Keep, kept, resolve, size_after, touched
from secateur.structure.capture import capture, quiet
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Ref, Restrict, Step, Trace, numbers_in, tensors_of
from secateur.types import Certificate, Example

PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "linear"])


class Replay:
    """One replay of a trace with some units removed.

    Args:
        trace: the run of the original model.
        tensors: its parameters and buffers by name.
        keep: atom id -> bool array, True = kept; absent atoms are whole.
        tape: plain numbers of the cut model's run, used where its calls are the same.
    """

    def __init__(self, trace: Trace, tensors: Mapping[str, Tensor], keep: Keep, tape: Sequence[Entry] = ()) -> None:
        self.trace, self.tensors, self.keep = trace, tensors, keep
        self.tape = align(trace.steps, tape)
        self.cut = {i for i, mask in keep.items() if not mask.all()}
        self.counts = {i: int(mask.sum()) for i, mask in keep.items()}
        self.values: dict[int, Tensor] = {}
        self.last_use = {
            n: i
            for i, step in enumerate(trace.steps)
            for n in (*numbers_in(step.args), *numbers_in(step.kwargs), *step.outputs)
        }

    def run(self) -> list[Tensor]:
        """Outputs of the original model with the removed parts left out, cut to the kept coordinates.

        Raises:
            CertificateError: a removed part reached an output.
        """
        wanted = set(self.trace.outputs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for i, step in enumerate(self.trace.steps):
                self._run_step(step, self.tape[i] if self.tape else None)
                for n in {*numbers_in(step.args), *numbers_in(step.kwargs), *step.outputs}:
                    if self.last_use[n] == i and n not in wanted:
                        self.values.pop(n, None)
            return [self.kept_only(self._value(n), self.trace.axes[n]) for n in self.trace.outputs]

    def _value(self, number: int) -> Tensor:
        if number not in self.values:
            name = self.trace.names.get(number)
            if name is None:
                self.values[number] = self.trace.constants[number].clone()
            else:
                self.values[number] = self._poisoned(self.tensors[name].detach(), self.trace.axes[number])
        return self.values[number]

    def _poisoned(self, tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        out = tensor.clone()
        if _can_be_nan(out):
            for d, axis in enumerate(axes):
                if touched(axis, self.cut):
                    out.index_fill_(d, self._removed(axis), float("nan"))
        return out

    def _indices(self, axis: Axis, *, removed: bool) -> Tensor:
        mask = kept(axis, self.keep)
        return torch.from_numpy(np.flatnonzero(~mask if removed else mask))

    def _removed(self, axis: Axis) -> Tensor:
        return self._indices(axis, removed=True)

    def kept_only(self, tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        """The kept coordinates of a tensor."""
        for d, axis in enumerate(axes):
            if touched(axis, self.cut):
                tensor = tensor.index_select(d, self._indices(axis, removed=False))
        return tensor

    def _run_step(self, step: Step, entry: Entry | None) -> None:
        local: dict[int, Tensor] = {}
        short = _sums_in_full(step)
        for number, d, axis in step.contracted:
            if touched(axis, self.cut):
                source = local.get(number, self._value(number))
                local[number] = (
                    _pick(source, d, self._indices(axis, removed=False))
                    if short
                    else source.index_fill(d, self._removed(axis), 0)
                )
        restrict = step.restrict
        narrowed = restrict is not None and any(touched(a, self.cut) for _, _, a in restrict.inputs)
        args, kwargs = (list(step.args), step.kwargs) if entry is None else numbers(step, entry)
        if restrict is not None and narrowed:
            self._check_aligned(restrict, step)
            for number, d, axis in restrict.inputs:
                if touched(axis, self.cut):
                    source = local.get(number, self._value(number))
                    local[number] = source.index_select(d, self._indices(axis, removed=False))
            for position, size in restrict.sizes.items():
                args[position] = (
                    [size_after(a, self.counts) for a in size]
                    if isinstance(size, tuple)
                    else size_after(size, self.counts)
                )
        func = torch.ops.aten.reshape.default if step.func is torch.ops.aten.view.default else step.func
        result = func(*self._filled(args, local), **self._filled(kwargs, local))
        produced = tensors_of(result)
        if restrict is not None and narrowed:
            for position, d, axis in restrict.outputs:
                if touched(axis, self.cut):
                    produced[position] = self._spread(produced[position], d, axis)
        for number, tensor in zip(step.outputs, produced, strict=True):
            self.values[number] = tensor

    def _check_aligned(self, restrict: Restrict, step: Step) -> None:
        for positions in restrict.aligned:
            masks = [kept(restrict.inputs[i][2], self.keep) for i in positions]
            if any(not np.array_equal(masks[0], mask) for mask in masks[1:]):
                raise CertificateError(
                    "Two dimensions that meet index by index would keep different coordinates.",
                    why=f"at {step.place.op} in {step.place.module or 'the model'} ({step.place.where})",
                    hint="Please report the model; nothing was changed or saved.",
                )

    def _spread(self, tensor: Tensor, d: int, axis: Axis) -> Tensor:
        shape = list(tensor.shape)
        shape[d] = axis.size
        blank = float("nan") if _can_be_nan(tensor) else 0
        out = torch.full(shape, blank, dtype=tensor.dtype, device=tensor.device)
        return out.index_copy_(d, self._indices(axis, removed=False), tensor)

    def _filled(self, tree: Any, local: Mapping[int, Tensor]) -> Any:
        if isinstance(tree, Ref):
            return local[tree.number] if tree.number in local else self._value(tree.number)
        if isinstance(tree, (list, tuple)):
            items = [self._filled(item, local) for item in tree]
            return items if isinstance(tree, list) else tuple(items)
        if isinstance(tree, dict):
            return {key: self._filled(item, local) for key, item in tree.items()}
        return tree


def _pick(tensor: Tensor, d: int, indices: Tensor) -> Tensor:
    """`index_select`, along the rows in memory where the tensor is a transposed matrix (three times as fast)."""
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        return tensor.t().index_select(1 - d, indices).t()
    return tensor.index_select(d, indices)


def _sums_in_full(step: Step) -> bool:
    """Whether both operands can go without the removed positions, rather than with zeros there (the same, faster)."""
    numbers = [number for number, _, _ in step.contracted]
    if len(numbers) != 2 or numbers[0] == numbers[1]:
        return False
    (_, _, a), (_, _, b) = step.contracted
    if resolve(a) is not resolve(b):
        return False
    name = base_name(step.func)
    return name in PRODUCTS or (name == "convolution" and step.args[8] == 1)


def certify(
    model: nn.Module,
    cut: nn.Module,
    example: Example,
    trace: Trace,
    keep: Keep,
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
) -> Certificate:
    """Prove that `cut` gives the outputs of `model` replayed with the removed parts left out.

    Args:
        model: the original, whole.
        cut: the physically smaller model.
        example: the inputs of the trace.
        trace: from `capture(model, example)`.
        keep: atom id -> bool array of kept indices.
        dtype: "float32" compares in the models' own precision; "float64" compares double copies of both.
        tolerance: as in `agreement`.

    Returns:
        the certificate with the largest error found.

    Raises:
        UnsupportedError: the cut model does not run.
        CertificateError: shapes differ, a removed part reached an output, or the error is above the tolerance.

    Cost: about two forward passes of the original and one of the cut model.
    """
    if dtype == "float64":
        model, cut, example = (doubled(x) for x in (model, cut, example))
        trace = capture(model, example)  # the same calls in the same order: the same atoms
    named = named_tensors(model)
    with quiet(cut), torch.no_grad(), NumberTape() as tape:
        answer = run_cut(
            cut,
            example,
            when="after this cut",
            hint="Kept counts that are multiples of 8 often help (round_to: 8); else protect the module named above.",
        )
    found = [t.detach() for t in outputs(answer)]
    replay = Replay(trace, named, keep, tape.entries)
    _same_slices(replay, {**dict(cut.named_parameters()), **dict(cut.named_buffers())})
    expected = replay.run()
    return agreement(
        expected,
        found,
        tolerance,
        method="replay",
        differs="is not that of its replayed plan",
        nan="a removed part reaches the output of the replayed plan: the engine's rules for this model are wrong",
        hint="Please report the model; nothing was changed or saved.",
    )


def _same_slices(replay: Replay, cut: Mapping[str, Tensor]) -> None:
    """Every tensor of the cut model holds exactly the kept slices."""
    for name, axes in replay.trace.tensors().items():
        if any(touched(axis, replay.cut) for axis in axes):
            require_slices(name, replay.kept_only(replay.tensors[name], axes), cut.get(name))


def _can_be_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
