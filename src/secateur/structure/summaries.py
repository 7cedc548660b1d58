"""Outputs that sum units up, a mean over heads say: the cut model's are over the units that stay, and the plan says so.

So does what is kept after the forward: a loss in an attribute or in a list, what a hook has put aside.
Behind a layer such a number is a feature like any other, as in a norm. In an output it is what the user reads, and a
masked model gives another one. A sum of what a removed unit leaves at zero is the same in both, and needs no words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from secateur.structure.axes import Axis, leaves
from secateur.structure.expressions import attributes_in, dims_in
from secateur.structure.provenance import Attribute
from secateur.structure.rules.base import MOVED, base_name
from secateur.structure.trace import Step, Trace, numbers_in
from secateur.types import Condition

Atoms = frozenset[int]
NONE: Atoms = frozenset()
SUMS = ("sum", "nansum", "linalg_vector_norm", "norm", "count_nonzero", "any")
ATTENTION = "_scaled_dot_product"
# What gives zero for zero, and what moves or picks elements or puts those of other dimensions together.
KEEPS_ZERO = frozenset([
    *MOVED, "relu", "relu6", "gelu", "silu", "tanh", "sin", "sinh", "asinh", "atan", "neg", "abs", "sqrt", "square",
    "leaky_relu", "elu", "selu", "celu", "hardswish", "mish", "softshrink", "hardshrink", "sign", "sgn", "trunc",
    "floor", "ceil", "round", "erf", "expm1", "log1p", "dropout", "native_dropout", "nan_to_num", "slice", "select",
    "split", "split_with_sizes", "unbind", "chunk", "narrow", "cat", "stack", "flip", "roll", "index_select", "index",
    "gather", "reshape", "permute", "unfold", "tril", "triu", "constant_pad_nd", "mean", "amax", "amin", "max", "min",
    "cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "repeat",
    "_adaptive_avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "_reshape_alias", "contiguous",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest1d", "upsample_linear1d",
    "embedding", "prelu", "_prelu_kernel", "real", "imag", "view_as_real", "view_as_complex", *SUMS,
])  # fmt: skip
FACTORS = ("mul", "bmm", "mm", "mv", "dot", "convolution", "linear", "_grouped_mm")  # zero where one of them is
RATIOS = ("div", "pow", "true_divide")  # zero where the first is
JOINS = ("add", "sub", "lerp", "maximum", "minimum", "where")  # zero where all are
ADDED = ("addmm", "baddbmm", "addmv")
BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm")
OUTPUT, LEFT = "an output", "what is kept after the forward"
STATED = 4  # names of groups that one sentence lists


def summarised(trace: Trace, groups: Mapping[str, int], attributes: Collection[Attribute]) -> Iterator[Condition]:
    """One condition for each line that sums up units that are cut, of which an output is made, or what is kept.

    Args:
        trace: of the original.
        groups: name of a group that loses units -> id of its atom.
        attributes: that follow the cut.
    """
    names = {atom: name for name, atom in groups.items()}
    said: set[str] = set()
    for run in (trace, *trace.further, *trace.beside):
        for holder, step, atoms in _Summaries(run, frozenset(names), attributes).found():
            if step.place.where in said:
                continue
            said.add(step.place.where)
            over = ", ".join(repr(names[atom]) for atom in sorted(atoms)[:STATED])
            what = f"{holder} holds a {base_name(step.func)} over units of {over}"
            text = f"{what}, in the cut model over those that stay: a masked model gives another one"
            yield Condition(text, step.place.where, step.place.module)


class _Summaries:
    """One run, step by step.

    Args:
        trace: of the run.
        cut: ids of atoms that lose units.
        attributes: that follow the cut.
    """

    def __init__(self, trace: Trace, cut: Atoms, attributes: Collection[Attribute]) -> None:
        self.trace, self.cut = trace, cut
        # Tensor number -> atoms whose removed units are zero in the masked original.
        self.zero: dict[int, Atoms] = {number: self._over(number) for number in trace.names}
        self.weights = set(trace.names)
        self.summed: dict[int, Atoms] = {}  # sums that a size may turn into means, over these atoms
        self.made: dict[int, tuple[Step, Atoms]] = {}
        self.sizes: dict[str, Atoms] = {}  # line -> atoms whose sizes it reckons with
        for use in trace.factors:
            by = self._in(list(dims_in(use.expr)))
            follows = cut if any(each in attributes for each in attributes_in(use.expr)) else NONE
            self.sizes[use.place.where] = self.sizes.get(use.place.where, NONE) | by | follows

    def found(self) -> Iterator[tuple[str, Step, Atoms]]:
        """What holds it, and the step that sums up units, of which it is made."""
        for step in self.trace.steps:
            self._follow(step)
        for holder, numbers in ((OUTPUT, self.trace.outputs), (LEFT, self.trace.left)):
            for number in numbers:
                if number in self.made:
                    yield holder, *self.made[number]

    def _in(self, axes: Collection[Axis]) -> Atoms:
        return frozenset(atom.id for axis in axes for atom in leaves(axis)) & self.cut

    def _over(self, number: int) -> Atoms:
        return self._in(self.trace.axes.get(number, ()))

    def _follow(self, step: Step) -> None:
        inputs = [*numbers_in(step.args), *numbers_in(step.kwargs)]
        if inputs and all(n in self.weights for n in inputs):
            self.weights.update(step.outputs)
        zero = self._zero(step, inputs)
        for number in step.outputs:
            self.zero[number] = zero & self._over(number)
        layer = bool(step.contracted) and any(n in self.weights for n in inputs)
        if layer or not step.outputs:
            for number in step.outputs:
                self.made.pop(number, None)
            return
        over, summed = self._mixed(step, inputs)
        made = (step, over) if over else next((self.made[n] for n in inputs if n in self.made), None)
        summed = summed.union(*(self.summed.get(n, NONE) for n in inputs))
        by_size = summed & self.sizes.get(step.place.where, NONE) if torch.Tag.pointwise in step.func.tags else NONE
        if made is None and by_size:
            made = step, by_size
        for number in step.outputs:
            if made is not None:
                self.made[number] = made
            if summed:
                self.summed[number] = summed

    def _mixed(self, step: Step, inputs: Collection[int]) -> tuple[Atoms, Atoms]:
        """Atoms over which a step makes something that a masked model would not; and those that it sums up."""
        restricted = () if step.restrict is None else step.restrict.inputs
        over = self._in([axis for _, _, axis in (*restricted, *step.contracted)])
        if not over:
            return NONE, NONE
        zero = NONE.union(*(self.zero.get(n, NONE) for n in inputs))
        name = base_name(step.func)
        if step.contracted or name.startswith(ATTENTION):
            return over - zero, NONE
        if name in SUMS:
            return over - zero, over
        return over, NONE

    def _zero(self, step: Step, inputs: Collection[int]) -> Atoms:
        """Atoms whose removed units are zero in the results of a step."""
        name = base_name(step.func)
        each = [self.zero.get(n, NONE) for n in inputs]
        if not each:
            return NONE
        if name in RATIOS:
            return each[0]
        if name in JOINS:
            plain = [a for a in step.args if isinstance(a, (int, float)) and a != 0]
            return NONE if plain else each[0].intersection(*each)
        if name in ADDED:  # an addend that all units share is no zero
            return each[0] & NONE.union(*each[1:])
        if name in BATCH_NORMS:  # by their factors and offsets: the statistics of nothing are no zeros
            return NONE.union(*(self.zero.get(n, NONE) for n in numbers_in(list(step.args[1:3]))))
        known = name in FACTORS or name in KEEPS_ZERO or name.startswith(ATTENTION)
        return NONE.union(*each) if known else NONE
