"""The certificate: replay the recorded calls with the removed parts left out, and compare with the cut model.

The original weights go through the original calls at full size. What was removed is NaN, so a slice that is read by
mistake poisons the result. Sums leave removed positions out; operations that mix a dimension (norms, softmax, means)
run on the kept coordinates only. Whatever the cut model returns must agree at every kept coordinate.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, ForwardError, UnsupportedError
from secateur.kinds.slices.numbers import Entry, Tape, align, numbers
from secateur.model.call import call, outputs
from secateur.model.tensors import named_tensors
from secateur.structure.axes import Axis, Keep, kept, resolve, size_after, touched
from secateur.structure.capture import capture, quiet, tensors_of
from secateur.structure.record import Record, Ref, Restrict, Step, numbers_in
from secateur.structure.rules.base import base_name
from secateur.types import Certificate, Example

PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "linear"])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
MEANINGFUL = 100.0


class Replay:
    """One replay of a record with some units removed.

    Args:
        record: the run of the original model.
        tensors: its parameters and buffers by name.
        keep: atom id -> bool array, True = kept; absent atoms are whole.
        tape: plain numbers of the cut model's run, used where its calls are the same.
    """

    def __init__(self, record: Record, tensors: Mapping[str, Tensor], keep: Keep, tape: Sequence[Entry] = ()) -> None:
        self.record, self.tensors, self.keep = record, tensors, keep
        self.tape = align(record.steps, tape)
        self.cut = {i for i, mask in keep.items() if not mask.all()}
        self.counts = {i: int(mask.sum()) for i, mask in keep.items()}
        self.values: dict[int, Tensor] = {}
        self.last_use = {
            n: i
            for i, step in enumerate(record.steps)
            for n in (*numbers_in(step.args), *numbers_in(step.kwargs), *step.outputs)
        }

    def run(self) -> list[Tensor]:
        """Outputs of the original model with the removed parts left out, cut to the kept coordinates.

        Raises:
            CertificateError: a removed part reached an output.
        """
        wanted = set(self.record.outputs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for i, step in enumerate(self.record.steps):
                self._run_step(step, self.tape[i] if self.tape else None)
                for n in {*numbers_in(step.args), *numbers_in(step.kwargs), *step.outputs}:
                    if self.last_use[n] == i and n not in wanted:
                        self.values.pop(n, None)
            return [self.kept_only(self._value(n), self.record.axes[n]) for n in self.record.outputs]

    def _value(self, number: int) -> Tensor:
        if number not in self.values:
            name = self.record.names.get(number)
            if name is None:
                self.values[number] = self.record.constants[number].clone()
            else:
                self.values[number] = self._poisoned(self.tensors[name].detach(), self.record.axes[number])
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
    record: Record,
    keep: Keep,
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
) -> Certificate:
    """Prove that `cut` gives the outputs of `model` replayed with the removed parts left out.

    Args:
        model: the original, whole.
        cut: the physically smaller model.
        example: the inputs of the record.
        record: from `capture(model, example)`.
        keep: atom id -> bool array of kept indices.
        dtype: "float32" compares in the models' own precision; "float64" compares double copies of both.
        tolerance: largest allowed error relative to max(1, largest output), and never above a hundred times that
            relative to the largest output itself; default by dtype (1e-5 in float32, 1e-10 in float64).

    Returns:
        the certificate with the largest error found.

    Raises:
        UnsupportedError: the cut model does not run.
        CertificateError: shapes differ, a removed part reached an output, or the error is above the tolerance.

    Cost: about two forward passes of the original and one of the cut model.
    """
    if dtype == "float64":
        model, cut, example = (doubled(x) for x in (model, cut, example))
        record = capture(model, example)  # the same calls in the same order: the same atoms
    named = named_tensors(model)
    with quiet(cut), torch.no_grad(), Tape() as tape:
        answer = run_cut(
            cut,
            example,
            when="after this cut",
            hint="Kept counts that are multiples of 8 often help (round_to: 8); else protect the module named above.",
        )
    found = [t.detach() for t in outputs(answer)]
    replay = Replay(record, named, keep, tape.entries)
    _same_slices(replay, named_tensors(cut))
    expected = replay.run()
    return agreement(
        expected,
        found,
        tolerance,
        method="replay",
        differs="is not that of its replayed plan",
        hint="Please report the model; nothing was changed or saved.",
    )


def agreement(
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    tolerance: float | None,
    *,
    method: str,
    differs: str,
    hint: str,
) -> Certificate:
    """The certificate that the outputs of a cut model are the expected ones.

    Args:
        expected: what the cut model should give.
        found: what it gives.
        tolerance: as in `certify`.
        method: what the certificate calls the proof.
        differs: says what an output is not, for the error.
        hint: what to do then.

    Raises:
        CertificateError: another number of outputs, other shapes, or an error above the tolerance.
    """
    if len(found) != len(expected):
        raise CertificateError(
            "The cut model returns another number of tensors than the original.",
            why=f"{len(found)} instead of {len(expected)}",
        )
    worst, limit, precision = 0.0, tolerance or TOLERANCE[torch.float32], torch.float32
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        error, size = compare_outputs(i, a, b)
        if a.is_floating_point():
            precision = a.dtype
            limit = TOLERANCE.get(precision, limit) if tolerance is None else tolerance
        allowed = limit * min(max(1.0, size), MEANINGFUL * size)  # small outputs must not make the proof empty
        worst = max(worst, error)
        if error > allowed:
            raise CertificateError(
                f"Output {i} of the cut model {differs}.",
                why=f"largest error {error:.3g}, allowed {allowed:.3g}, largest output {size:.3g}",
                hint=hint,
            )
    return Certificate(worst, limit, str(precision).removeprefix("torch."), method, len(found))


def run_cut(cut: nn.Module, example: Example, *, when: str, hint: str) -> Any:
    """Run a cut model on the example.

    Raises:
        UnsupportedError: its forward fails; says `when` and gives the hint.
    """
    try:
        return call(cut, example)
    except ForwardError as error:
        what = f"{type(cut).__name__} does not run {when}; nothing was changed or saved."
        raise UnsupportedError(what, why=error.why, hint=hint) from error


def _same_slices(replay: Replay, cut: Mapping[str, Tensor]) -> None:
    """Every tensor of the cut model holds exactly the kept slices: also where the example leaves a unit silent."""
    for name, axes in replay.record.tensors().items():
        if any(touched(axis, replay.cut) for axis in axes):
            wanted = replay.kept_only(replay.tensors[name], axes)
            if wanted.shape != cut[name].shape or not torch.equal(wanted, cut[name]):
                raise CertificateError(
                    f"{name!r} of the cut model does not hold the slices that its plan keeps.",
                    why="the plan was changed after it was made, or the model between planning and cutting",
                    hint="Make the plan anew; nothing was changed or saved.",
                )


def doubled(value: Any) -> Any:
    """A copy in float64: of a module, or of the tensors in an example."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(doubled(item) for item in value)
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    return value


def _can_be_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def compare_outputs(i: int, expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest error and largest value of one output; refuses other shapes and removed parts that reach it."""
    if expected.is_complex() and found.is_complex():
        expected, found = torch.view_as_real(expected.resolve_conj()), torch.view_as_real(found.resolve_conj())
    if expected.shape != found.shape:
        raise CertificateError(
            f"Output {i} of the cut model has another shape than its replayed plan.",
            why=f"{tuple(found.shape)} instead of {tuple(expected.shape)}",
        )
    if not expected.is_floating_point():
        return float((expected != found).sum()), 1.0
    both = torch.isnan(expected) & torch.isnan(found)
    same = both | (expected == found)  # equal infinities count as equal
    difference = torch.where(same, torch.zeros_like(expected), expected - found).abs()
    if difference.numel() == 0:
        return 0.0, 1.0
    if torch.isnan(difference).any():
        raise CertificateError(
            f"A removed part reaches output {i} of the replayed plan.",
            why="the engine's rules for this model are wrong",
            hint="Please report the model; nothing was changed or saved.",
        )
    finite = expected[torch.isfinite(expected)]
    return float(difference.max()), float(finite.abs().max()) if finite.numel() else 0.0
