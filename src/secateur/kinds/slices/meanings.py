"""Numbers that a width enters are followed through a replay until they mean something, or the cut is refused.

The cut model reckons with its own widths. Where such a number changes nothing on the example (behind a clamp, a
comparison, an argmax), agreement on the example says nothing about it. So beside the replay, which takes the numbers of
the cut model, what they touch is replayed with those of the original. The two must meet again, and by nothing that
could hide a difference: in a mean over what is kept (`extents`), or because a factor in the weights makes up for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from secateur.kinds.slices.asked_of_steps import grow_alike, inputs_of, is_same, is_uniform, lives, scalars_of
from secateur.kinds.slices.extents import Extent, brought, grown
from secateur.kinds.slices.fold import Scale
from secateur.kinds.slices.narrow import Narrow, spread_out
from secateur.kinds.slices.number_tape import MADE, READ, PlayedCall
from secateur.structure.axes import resolve, size_after
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Ref, Step, tensors_of

if TYPE_CHECKING:
    from secateur.kinds.slices.replay import Replay

PRODUCTS = frozenset(["mm", "bmm", "addmm", "baddbmm", "linear", "mv", "addmv", "dot", "vdot", "convolution", "addbmm",
                      "_trilinear"])  # fmt: skip
SUMS = {"sum": 1.0, "nansum": 1.0, "count_nonzero": 1.0}
NORMS = ("linalg_vector_norm", "norm")
AVERAGES = {"mean": 1.0, "amax": 1.0, "amin": 1.0, "max": 1.0, "min": 1.0, "std": 1.0, "var": 2.0, "median": 1.0}
POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}
ATTENTION = "_scaled_dot_product"
# What takes part of a tensor: of a weight with a factor on some rows, the others are as they were.
PICKS = frozenset(["split", "split_with_sizes", "unbind", "select", "slice", "chunk", "index_select", "narrow"])
NORMALISED = frozenset(["native_layer_norm", "_fused_rms_norm", "native_group_norm", "rms_norm"])
FACTORS = frozenset(["mul", "div", "addmm", "baddbmm", "addmv", "addbmm", "addcmul", "addcdiv"])
# What hands a factor on, so that it can be made up for later: nothing of a tensor is lost in these, whatever it holds.
HANDED_ON = frozenset([
    *PRODUCTS, *SUMS, *NORMS, "mul", "div", "mean", "add", "sub", "rsub", "neg", "pow", *POWERS, "addcmul", "addcdiv",
    "t", "transpose", "permute", "alias", "detach", "clone", "_to_copy", "unsqueeze", "squeeze", "expand", "view",
    "_unsafe_view", "reshape", "_reshape_alias", "cat", "stack", "split", "split_with_sizes", "unbind",
    "select", "slice", "index",
    "index_select", "gather", "chunk", "repeat", "copy", "constant_pad_nd", "roll", "flip", "unfold", "as_strided",
    "slice_scatter", "select_scatter", "masked_fill", "tril", "triu", "view_as_complex", "view_as_real", "_conj",
    "_cdist_forward", "_euclidean_dist", "unsafe_split", "lift_fresh", "contiguous", "real", "imag", "narrow",
    "clamp_min",
])  # fmt: skip
# Of a tensor these take the form alone.
LIKE = frozenset(["ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"])


class Meanings:
    """What the numbers of a cut model mean, as far as a replay has come.

    Args:
        replay: the replay with the numbers of the cut model.
        twin: one of the same trace with those of the original, which takes from `replay` what both have in common.
        scales: factors that the cut model holds beside its slices.

    Attributes:
        changed: lines of the user's code at which the function of what is left would change, with what is done there.
        meant: lines that divide by the number of what they sum.
    """

    def __init__(self, replay: Replay, twin: Replay, scales: Sequence[Scale]) -> None:
        self.replay, self.twin = replay, twin
        self.scaled = {scale.tensor for scale in scales}
        self.grows: dict[int, Extent | None] = {}  # None: by as much as nobody can tell; absent: not at all
        self.read: set[object] = set()  # numbers that the code has read from tensors
        self.made: set[int] = set()  # numbers of the code that became tensors
        self.fixed: set[int] = set()  # tensors that were made of weights and constants alone
        self.plain: set[int] = set()  # and those that were made of constants and forms alone
        self.touched: dict[int, str] = {}  # tensor that differs between the two -> the line that made it differ
        self.changed: dict[str, str] = {}
        self.meant: dict[str, None] = {}

    # -- before the replay runs a step, which may write over what it reads ----------------------------------------

    def before(self, step: Step, played: PlayedCall | None) -> list[Tensor | Narrow] | None:
        """Results of a step under the original's numbers; None where they are those of the replay."""
        if played is not None and READ in played.kwargs:
            self.read.add(played.kwargs[READ])
        if self._counts_units(step):
            return self._in_full(step)
        if not self._differs(step, played) and not self._touches(step):
            return None
        name, kwargs = base_name(step.func), dict(step.kwargs)
        if name.startswith(ATTENTION) and kwargs.get("scale") is None:
            kwargs["scale"] = float(self._width_of(step)) ** -0.5
        return self.twin.produce(step, list(step.args), kwargs)

    def _differs(self, step: Step, played: PlayedCall | None) -> bool:
        """Whether the cut model passes another number of its own."""
        if played is None:  # what only moves data
            return False
        if MADE in played.func._schema.name:
            whole = self._constant(step)
            made = played.args[0]
            return isinstance(made, Tensor) and whole is not None and not torch.equal(whole, made)
        if base_name(step.func).startswith(ATTENTION) and step.kwargs.get("scale") is None:
            return self._width_of(step) != size_after(self.replay.trace.axes[self._first(step)][-1], self._counts())
        return bool(self._numbers(step, played)) or self._makes_another_size(step, played)

    def _makes_another_size(self, step: Step, played: PlayedCall) -> bool:
        """Whether a tensor made of numbers has another size in the cut model, and nothing else says so."""
        if inputs_of(step) or not step.outputs:
            return False
        axes = [axis for n in step.outputs for axis in self.replay.trace.axes[n]]
        if any(size_after(axis, self._counts()) != axis.size for axis in axes):
            return False
        pairs = zip(step.args, played.args, strict=True)
        return any(type(a) in (int, float, list, tuple) and a != b for a, b in pairs)

    def _numbers(self, step: Step, played: PlayedCall | None) -> list[tuple[str, float, float]]:
        """(name of the argument, number of the original, number of the cut model), of those that differ."""
        if played is None:
            return []
        values = torch.Tag.pointwise in played.func.tags or base_name(step.func) in ("full", "fill", "scalar_tensor")
        names = [argument.name for argument in step.func._schema.arguments]
        scalars = scalars_of(step)
        mine = {**dict(zip(names, step.args, strict=False)), **step.kwargs}
        theirs = {**dict(zip(names, played.args, strict=False)), **played.kwargs}
        pairs = ((name, value, theirs.get(name, value)) for name, value in mine.items())
        pairs = ((n, a, b) for n, a, b in pairs if type(a) in (int, float) and type(b) in (int, float) and a != b)
        found = ((n, a, b) for n, a, b in pairs if values or n in scalars or type(a) is float)
        return [(n, a, b) for n, a, b in found if b not in self.read]  # type: ignore[misc]

    def _touches(self, step: Step) -> list[int]:
        return [n for n in inputs_of(step) if self._is_touched(n)]

    def _is_touched(self, number: int) -> bool:
        view = self.replay.originals.views.get(number)
        return number in self.touched or (view is not None and view.name in self.scaled)

    # -- after it -------------------------------------------------------------------------------------------------

    def after(self, step: Step, played: PlayedCall | None, other: list[Tensor | Narrow] | None) -> None:
        """Follow what a step has made of numbers."""
        if step.outputs and step.outputs[0] in self.replay.originals.views:
            return
        inputs = inputs_of(step)
        if inputs and all(self._is_fixed(n) for n in inputs):
            self.fixed.update(step.outputs)
        if self._is_made_of_forms(step, inputs):
            self.plain.update(step.outputs)
            if other is not None and self._counts_units(step):
                self._note(step, Extent())
                if not self._alike(step, other):
                    self.made.update(step.outputs)
                    self._touch(step, other, [])
                return
        differs = other is not None and self._differs(step, played)
        grows = self._grown(step, played if differs else None)
        if other is None:
            self._note(step, grows)
            return
        touched = self._touches(step)
        if self._makes_a_number(step, inputs, differs=differs):
            self.made.update(step.outputs)
            self._touch(step, other, touched)
        elif grows is not None and self._settles(step, grows, touched, differs=differs):
            self._note(step, grows.settled())
        elif not self._hands_on(step, played, touched, other, differs=differs):
            self._refuse(step, touched)
        elif self._meets(step, touched, other, differs=differs):
            self._note(step, Extent())
        else:
            self._note(step, grows)
            self._touch(step, other, touched)

    def finish(self) -> None:
        """Outputs that still differ are other outputs."""
        for number in self.replay.trace.outputs:
            if number in self.touched:
                self.changed.setdefault(self.touched[number], "an output")

    def _makes_a_number(self, step: Step, inputs: Sequence[int], *, differs: bool) -> bool:
        if MADE in step.func._schema.name or not inputs:
            return True
        return all(n in self.made for n in inputs) or (
            not differs
            and any(n in self.made for n in inputs)
            and all(n in self.made or self._is_plain(n) for n in inputs)
        )

    def _is_made_of_forms(self, step: Step, inputs: Sequence[int]) -> bool:
        """Whether results depend on neither data nor weights: ones, positions, and what comes of them."""
        if torch.Tag.nondeterministic_seeded in step.func.tags:
            return False
        return base_name(step.func) in LIKE or all(n in self.plain or self._is_plain(n) for n in inputs)

    def _counts_units(self, step: Step) -> bool:
        """Whether a call sums up constants over a dimension that is cut, which tells its width."""
        inputs = inputs_of(step)
        if not inputs or any(n in self.touched for n in inputs) or not self._is_made_of_forms(step, inputs):
            return False
        restricted = () if step.restrict is None else step.restrict.inputs
        over = [axis for _, _, axis in (*step.contracted, *restricted)]
        return any(size_after(axis, self._counts()) != axis.size for axis in over)

    def _in_full(self, step: Step) -> list[Tensor | Narrow]:
        """Results of a call over all positions, as the original has them."""
        args, kwargs = self.replay._filled(list(step.args), {}), self.replay._filled(dict(step.kwargs), {})
        return [*tensors_of(step.func(*cast("list[object]", args), **cast("dict[str, object]", kwargs)))]

    def _is_plain(self, number: int) -> bool:
        """Whether a tensor is a constant of the code, and no weight."""
        return number in self.replay.trace.constants and number not in self.replay.trace.inputs

    def _settles(self, step: Step, grows: Extent, touched: Sequence[int], *, differs: bool) -> bool:
        """Whether what the numbers of the code took away is just what sums have brought: a mean over what is kept."""
        if not grows.number or grows.settled().number or base_name(step.func) not in HANDED_ON:
            return False
        if any(self._is_scaled(n) for n in touched):
            return False
        self.meant[step.place.where] = None
        return True

    def _is_scaled(self, number: int) -> bool:
        view = self.replay.originals.views.get(number)
        return view is not None and view.name in self.scaled

    def _hands_on(
        self,
        step: Step,
        played: PlayedCall | None,
        touched: Sequence[int],
        other: list[Tensor | Narrow],
        *,
        differs: bool,
    ) -> bool:
        """Whether nothing in a step could hide that it was given another number."""
        name = base_name(step.func)
        if name.startswith(ATTENTION):
            return self._alike(step, other)
        if any(n in self.made for n in touched) and name not in ("mul", "div"):
            return False
        if differs and (name not in FACTORS or not self._are_factors(step, played)):
            return False
        if name in NORMALISED:
            return self._first(step) not in touched or self._alike(step, other)
        if name == "where":
            return self._first(step) not in touched
        return name in HANDED_ON and not step.kwargs.get("rounding_mode")

    def _are_factors(self, step: Step, played: PlayedCall | None) -> bool:
        names = {name for name, _, _ in self._numbers(step, played)}
        return names <= {"other", "alpha", "beta", "value"} and not (base_name(step.func) == "mul" and "alpha" in names)

    def _meets(self, step: Step, touched: Sequence[int], other: list[Tensor | Narrow], *, differs: bool) -> bool:
        """Whether two factors that make up for each other come together here: nowhere else could they."""
        name = base_name(step.func)
        data = [n for n in touched if n not in self.made]
        together = (differs and bool(data)) or (len(touched) > 1 and (name in PRODUCTS or name in ("mul", "div")))
        if name.startswith(ATTENTION) or name in NORMALISED:
            return self._alike(step, other)
        return together and self._alike(step, other) and any(lives(self.replay.values[n]) for n in step.outputs)

    def _alike(self, step: Step, other: Sequence[Tensor | Narrow]) -> bool:
        return all(is_same(self.replay.values[n], t) for n, t in zip(step.outputs[:1], other[:1], strict=True))

    def _touch(self, step: Step, other: Sequence[Tensor | Narrow], touched: Sequence[int]) -> None:
        where = next((self.touched[n] for n in touched if n in self.touched), step.place.where)
        picks = base_name(step.func) in PICKS
        for number, tensor in zip(step.outputs, other, strict=True):
            if picks and number not in self.made and lives(tensor) and is_same(self.replay.values[number], tensor):
                self.forget(number)
                continue
            self.touched[number] = where
            self.twin.values[number] = tensor

    def _refuse(self, step: Step, touched: Sequence[int]) -> None:
        where = next((self.touched[n] for n in touched if n in self.touched), step.place.where)
        self.changed.setdefault(where, base_name(step.func).strip("_"))
        self._note(step, None)

    def _note(self, step: Step, grows: Extent | None) -> None:
        for number in step.outputs:
            self.forget(number)
            if grows is None or grows:
                self.grows[number] = grows

    def forget(self, number: int) -> None:
        """Nothing reads a tensor any more, or it is the same in both."""
        self.twin.values.pop(number, None)
        self.touched.pop(number, None)
        self.grows.pop(number, None)

    # -- how much a result grows with the widths ------------------------------------------------------------------

    def _grown(self, step: Step, played: PlayedCall | None) -> Extent | None:
        name = base_name(step.func)
        data = [n for n in inputs_of(step) if n not in self.made]
        if not data:
            return Extent()
        each = [self.grows.get(n, Extent()) if not self._is_scaled(n) else None for n in data]
        if any(extent is None for extent in each):
            return None
        known = cast("list[Extent]", each)
        if name in SUMS or name in NORMS:
            return self._of_sum(step, name, known)
        if name in PRODUCTS:
            return self._of_product(step, played, data, known)
        if name in ("mul", "div"):
            return self._of_factors(step, name, played)
        if name == "pow" and isinstance(step.args[1], (int, float)):
            return known[0] ** float(step.args[1])
        if name in POWERS:
            return known[0] ** POWERS[name]
        if name in AVERAGES:
            return known[0] ** AVERAGES[name]
        if name in HANDED_ON or torch.Tag.pointwise in step.func.tags:
            return grow_alike([e for n, e in zip(data, known, strict=True) if not self._is_plain(n)])
        return Extent()

    def _of_sum(self, step: Step, name: str, known: Sequence[Extent]) -> Extent | None:
        assert step.restrict is not None or not step.contracted
        power = 1.0
        if name in NORMS:
            order = step.args[1] if len(step.args) > 1 else 2
            order = 2.0 if order is None else float(cast(float, order))
            power = 0.0 if order in (0.0, float("inf"), float("-inf")) else 1 / order
        found = known[0]
        for _, _, axis in step.restrict.inputs if step.restrict is not None else ():
            found = found * grown(axis.size, size_after(axis, self._counts()), power)
        return found

    def _of_product(
        self, step: Step, played: PlayedCall | None, data: Sequence[int], known: Sequence[Extent]
    ) -> Extent | None:
        numbers = dict.fromkeys(n for n, _, _ in step.contracted)
        found = Extent()
        for number, extent in zip(data, known, strict=True):
            found = found * extent if number in numbers else found
        if sum(not self._is_fixed(n) for n in numbers) > 1 or (len(numbers) == 1 and not self._is_fixed(*numbers)):
            axes = {id(resolve(axis)): axis for _, _, axis in step.contracted}
            for axis in axes.values():
                found = found * grown(axis.size, size_after(axis, self._counts()))
        for name, before, after in self._numbers(step, played):
            more = brought(before, after) if name == "alpha" else None
            if more is None:
                return None
            found = found * more
        return found

    def _of_factors(self, step: Step, name: str, played: PlayedCall | None) -> Extent | None:
        found = Extent()
        for place, argument in enumerate(step.args[:2]):
            if isinstance(argument, Ref):
                part = self._of_operand(argument.number)
            else:
                theirs = argument if played is None else played.args[place]
                part = brought(cast(float, argument), cast(float, theirs)) if isinstance(theirs, (int, float)) else None
            if part is None:
                return None
            found = found * (part**-1.0 if name == "div" and place else part)
        return found

    def _of_operand(self, number: int) -> Extent | None:
        if number not in self.made:
            return None if self._is_scaled(number) else self.grows.get(number, Extent())
        if number not in self.touched:
            return Extent()
        after, before = (spread_out(replay.values[number]) for replay in (self.replay, self.twin))
        if not is_uniform(after) or not is_uniform(before) or not after.numel() or not before.numel():
            return None
        return brought(float(before.flatten()[0]), float(after.flatten()[0]))

    # -- small questions ------------------------------------------------------------------------------------------

    def _counts(self) -> Mapping[int, int]:
        return self.replay.kept.counts

    def _first(self, step: Step) -> int:
        return step.args[0].number if isinstance(step.args[0], Ref) else -1

    def _width_of(self, step: Step) -> int:
        return self.replay.trace.axes[self._first(step)][-1].size

    def _constant(self, step: Step) -> Tensor | None:
        return self.replay.trace.constants.get(self._first(step)) if step.args else None

    def _is_fixed(self, number: int) -> bool:
        trace = self.replay.trace
        return (
            number in self.fixed
            or number in trace.names
            or number in self.replay.originals.views
            or self._is_plain(number)
        )
