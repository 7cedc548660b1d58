"""The certificate: replay the recorded calls with the removed parts left out, and compare with the cut model.

The original weights go through the original calls at full size. What was removed is NaN, so a slice that is read by
mistake poisons the result. Sums leave removed positions out; operations that mix a dimension (norms, softmax, means)
run on the kept coordinates only. Whatever the cut model returns must agree at every kept coordinate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from secateur.errors import CertificateError
from secateur.kinds.slices.factors import Factor, factor_at, pick, spread, sums_in_full, with_bias_at
from secateur.kinds.slices.meanings import Meanings
from secateur.kinds.slices.narrow import Narrow, run_narrow, spread_out
from secateur.kinds.slices.number_tape import PlayedCall, align, numbers
from secateur.kinds.slices.originals import KeptSlices, Originals, StoredView, kept_only
from secateur.kinds.slices.unmade import SameSlices
from secateur.model.tensors import can_be_nan
from secateur.structure.axes import Keep, size_after
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Kwargs, Op, Ref, Restrict, Step, Trace, numbers_in, tensors_of


class Replay:
    """One replay of a trace with some units removed.

    Args:
        trace: the run of the original model.
        tensors: its parameters and buffers by name.
        keep: atom id -> bool array, True = kept; absent atoms are whole.
        tape: plain numbers of the cut model's run, used where its calls are the same.
        cut: parameters and buffers of the cut model, which are then compared slice by slice.
        same: those of them that were compared already.
    """

    def __init__(
        self,
        trace: Trace,
        tensors: Mapping[str, Tensor],
        keep: Keep,
        tape: Sequence[PlayedCall] = (),
        cut: Mapping[str, Tensor] | None = None,
        same: SameSlices | None = None,
    ) -> None:
        self.trace = trace
        self.meanings: Meanings | None = None  # follows the numbers of the tape, where there is one
        self.tape = align(trace.steps, tape)
        self.kept = KeptSlices(keep)
        self.originals = Originals(trace, tensors, self.kept, cut, same)
        self.values: dict[int, Tensor | Narrow] = {}
        last = {
            n: i
            for i, step in enumerate(trace.steps)
            for n in (*numbers_in(step.args), *numbers_in(step.kwargs), *step.outputs)
        }
        # Step -> tensors that nothing reads after it, so that a replay needs no more memory than a forward pass.
        self.done: dict[int, list[int]] = defaultdict(list)
        for n in last.keys() - set(trace.outputs):
            self.done[last[n]].append(n)

    def run(self) -> list[Tensor]:
        """Outputs of the original model with the removed parts left out, cut to the kept coordinates.

        Raises:
            CertificateError: a removed part reached an output, or the cut model holds other slices.
        """
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for i, step in enumerate(self.trace.steps):
                self._followed(step, self.tape[i] if self.tape else None)
                for n in self.done[i]:
                    self.values.pop(n, None)
                    if self.meanings is not None:
                        self.meanings.forget(n)
            if self.meanings is not None:
                self.meanings.finish()
            if self.originals.cut is not None:
                self.originals.require_the_rest()
            return [kept_only(self._value(n), self.trace.axes[n], self.kept) for n in self.trace.outputs]

    def _value(self, number: int) -> Tensor:
        if number not in self.values:
            name, view = self.trace.names.get(number), self.originals.views.get(number)
            if view is None and name is not None:  # one that the run writes to
                view = StoredView(name, tuple(range(len(self.trace.axes[number]))))
            # Copies, as calls of the run may write in place.
            constant = self.trace.constants.get(number)
            self.values[number] = self.originals.whole(view) if view is not None else cast(Tensor, constant).clone()
        return spread_out(self.values[number])

    def _at(self, number: int, d: int, stay: Tensor) -> Tensor:
        """A value at some positions of a dimension."""
        found = self.values.get(number)
        return found.at(d, stay) if isinstance(found, Narrow) else pick(self._value(number), d, stay)

    def _run_step(self, step: Step, entry: PlayedCall | None) -> None:
        if step.outputs and step.outputs[0] in self.originals.views:
            return  # a weight with its dimensions in another order: made when, and as far as, somebody reads it
        args, kwargs = (list(step.args), step.kwargs) if entry is None else numbers(step, entry)
        for number, tensor in zip(step.outputs, self.produce(step, args, kwargs), strict=True):
            self.values[number] = tensor

    def _followed(self, step: Step, entry: PlayedCall | None) -> None:
        """A step, and what becomes of the numbers in it."""
        other = None if self.meanings is None else self.meanings.before(step, entry)
        self._run_step(step, entry)
        if self.meanings is not None:
            self.meanings.after(step, entry, other)

    def produce(self, step: Step, args: list[object], kwargs: Kwargs) -> list[Tensor | Narrow]:
        """Results of one call at full size.

        Args:
            step: the call.
            args: its arguments, tensors as `Ref`.
            kwargs: those that are given by name.
        """
        produced = self._with_weight(step, args, kwargs)
        if produced is None:
            produced = run_narrow(step, args, kwargs, self.values, self._value)
        if produced is None:
            produced = self._looked_up(step)
        return self._in_full(step, args, kwargs) if produced is None else produced

    # -- the call as it was ----------------------------------------------------------------------------------

    def _in_full(self, step: Step, args: list[object], kwargs: Kwargs) -> list[Tensor | Narrow]:
        """The call at full size: sums leave removed positions out, mixed dimensions run on what is kept."""
        local = self._without_removed(step)
        restrict = step.restrict
        narrowed = restrict is not None and any(self.kept(axis) is not None for _, _, axis in restrict.inputs)
        if restrict is not None and narrowed:
            self._narrow(restrict, step, args, local)
        func = torch.ops.aten.reshape.default if step.func is torch.ops.aten.view.default else step.func
        filled, named = cast("list[object]", self._filled(args, local)), cast(Kwargs, self._filled(kwargs, local))
        if base_name(func) == "_to_copy":
            filled[0] = _countable(cast(Tensor, filled[0]), named.get("dtype"))
        produced = tensors_of(_attended(func, filled, named) or func(*filled, **named))
        if restrict is not None and narrowed:
            for position, d, axis in restrict.outputs:
                positions = self.kept(axis)
                if positions is not None:
                    produced[position] = spread(produced[position], d, axis.size, positions.stay)
        return [*produced]

    def _without_removed(self, step: Step) -> dict[int, Tensor]:
        """What a call sums over, without the removed positions: taken out, or zero where they must keep their place."""
        local: dict[int, Tensor] = {}
        short = sums_in_full(step)
        for number, d, axis in step.contracted:
            positions = self.kept(axis)
            if positions is not None:
                source = local.get(number, self._value(number))
                local[number] = (
                    pick(source, d, positions.stay)
                    if short
                    else source.index_fill(d, positions.go.to(source.device), 0)
                )
        return local

    def _narrow(self, restrict: Restrict, step: Step, args: list[object], local: dict[int, Tensor]) -> None:
        """Let a call that mixes dimensions see the kept coordinates only, and the sizes that belong to them."""
        self._check_aligned(restrict, step)
        for number, d, axis in restrict.inputs:
            positions = self.kept(axis)
            if positions is not None:
                source = local.get(number, self._value(number))
                local[number] = source.index_select(d, positions.stay.to(source.device))
        for position, size in restrict.sizes.items():
            args[position] = (
                [size_after(axis, self.kept.counts) for axis in size]
                if isinstance(size, tuple)
                else size_after(size, self.kept.counts)
            )

    def _check_aligned(self, restrict: Restrict, step: Step) -> None:
        """Refuse operands that would meet at different coordinates: as many of each, so nothing else would notice."""
        for places in restrict.aligned:
            found = [self.kept(restrict.inputs[i][2]) for i in places]
            masks = [None if positions is None else positions.mask for positions in found]
            if any(not _same_mask(masks[0], mask) for mask in masks[1:]):
                raise CertificateError(
                    "Two dimensions that meet index by index would keep different coordinates.",
                    why=f"at {step.place.op} in {step.place.module or 'the model'} ({step.place.where})",
                    hint="Please report the model; nothing was changed or saved.",
                )

    def _filled(self, tree: object, local: Mapping[int, Tensor]) -> object:
        if isinstance(tree, Ref):
            return local[tree.number] if tree.number in local else self._value(tree.number)
        if isinstance(tree, (list, tuple)):
            items = [self._filled(item, local) for item in tree]
            return items if isinstance(tree, list) else tuple(items)
        if isinstance(tree, dict):
            return {key: self._filled(item, local) for key, item in tree.items()}
        return tree

    # -- the same with less work -----------------------------------------------------------------------------

    def _with_weight(self, step: Step, args: list[object], kwargs: Kwargs) -> list[Tensor | Narrow] | None:
        """A product with a weight, at what the weight keeps; None where the call is no such product.

        A removed row of the weight is NaN, and so is all that the product makes of it: it is not multiplied, its
        results are written as NaN. What the weight keeps of each dimension is asked of the weight, not of the rule of
        the operator, so a wrong rule still meets the NaN that it forgot.
        """
        factor = self._factor(step)
        if factor is None:
            return None
        weight = cast(Ref, step.args[factor.at]).number
        (other, d), axis = next(((n, d), axis) for n, d, axis in step.contracted if n != weight)
        view = self.originals.views[weight]
        local = {weight: self.originals.factor(view, factor.summed, axis, factor.free)}
        summed = self.kept(axis)
        if summed is not None:
            local[other] = self._at(other, d, summed.stay)
        filled, named = self._filled(args, local), cast(Kwargs, self._filled(kwargs, local))
        free = view.dims[factor.free]
        stays, size = self.kept(self.originals.axes[view.name][free]), self.originals.tensors[view.name].shape[free]
        if stays is None:
            return [cast(Tensor, step.func(*cast("list[object]", filled), **named))]
        terms = with_bias_at(cast("list[object]", filled), factor, size, stays.stay)
        return [Narrow(cast(Tensor, step.func(*terms, **named)), factor.result, size, stays.stay)]

    def _factor(self, step: Step) -> Factor | None:
        """The weight in a product, where exactly one factor is a weight and the trace agrees with the operator."""
        if not step.contracted or step.restrict is not None or not sums_in_full(step):
            return None
        weights = [n for n, _, _ in step.contracted if n in self.originals.views]
        if len(weights) != 1 or step.func._schema.is_mutable or numbers_in(step.args).count(weights[0]) != 1:
            return None
        at = next((i for i, arg in enumerate(step.args) if isinstance(arg, Ref) and arg.number == weights[0]), None)
        view = self.originals.views[weights[0]]
        if at is None or not can_be_nan(self.originals.tensors[view.name]):
            return None
        found = factor_at(step, at, len(view.dims))
        summed = next(d for n, d, _ in step.contracted if n == weights[0])
        return found if found is not None and found.summed == summed else None

    def _looked_up(self, step: Step) -> list[Tensor | Narrow] | None:
        """Rows of a table: only those that are read are copied and poisoned."""
        if base_name(step.func) != "embedding" or not isinstance(step.args[0], Ref):
            return None
        view = self.originals.views.get(step.args[0].number)
        if view is None or view.dims != (0, 1) or self.kept(self.originals.axes[view.name][0]) is not None:
            return None
        rows, places = torch.unique(cast(Tensor, self._filled(step.args[1], {})), return_inverse=True)
        return [self.originals.rows(view, rows)[places]]


def _countable(tensor: Tensor, dtype: object) -> Tensor:
    """What is removed has no whole number; zero is one of every table, and what is read there is removed as well."""
    if not isinstance(dtype, torch.dtype) or dtype.is_floating_point or dtype.is_complex or not can_be_nan(tensor):
        return tensor
    return tensor.nan_to_num(0)


def _attended(func: Op, args: list[object], kwargs: Kwargs) -> list[Tensor] | None:
    """Attention whose values are of another size than its keys: the kernel for equal sizes, which ran, cannot do it."""
    if base_name(func) != "_scaled_dot_product_flash_attention_for_cpu":
        return None
    q, k, v = cast("list[Tensor]", args[:3])
    if q.shape[-1] == v.shape[-1]:
        return None
    causal, mask = bool(args[4]) if len(args) > 4 else False, kwargs.get("attn_mask")
    scale = cast("float | None", kwargs.get("scale"))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, cast("Tensor | None", mask), 0.0, causal, scale=scale
    )
    return [out, q.new_zeros(q.shape[:-1]).transpose(1, 2)]  # the second is bookkeeping that nobody reads


def _same_mask(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
