"""Arithmetic on tensors of which slices are missing: what the original computes once these slices are not there.

A missing slice is one that is NaN at every element. Operators that act element by element and those that move elements
hand NaN on by themselves. What is left are the operators that put several positions together, and these leave the
missing ones out: a sum of products runs over what both factors have, a mean or a norm over what its input has. Nothing
here asks which dimensions of a model belong together, so a mistake of the structure engine about that cannot be
repeated here. NaN that does not fill a slice is a result like any other, and is handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)

from secateur.kinds.slices.counted import Counted
from secateur.kinds.slices.gaps import (
    NAN,
    Arguments,
    GapCall,
    Op,
    has_nan,
    is_composite,
    look,
    name_of,
    others,
    pick,
    tensors,
    writes,
)
from secateur.kinds.slices.operators import HANDLERS
from secateur.kinds.slices.origins import ATTENDS, GROUPS, PRODUCTS, SERVES, Origins
from secateur.kinds.slices.placed import Bases
from secateur.kinds.slices.unmade import LEAN, VIEWS, Unmade
from secateur.model.memory import memory_of
from secateur.model.place import users_line
from secateur.model.tensors import can_be_nan
from secateur.structure.rules.base import MOVED, base_name

# What the code makes of no data: of a tensor these take the form alone.
FORMS = frozenset([
    "ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "lift_fresh", "lift_fresh_copy", "lift"
])  # fmt: skip
FILLS = ("masked_fill", "index_fill", "fill", "index_put", "scatter", "where", "copy")
# What these make of a parameter is an activation, as of a learned token; other reductions make another parameter of it.
NORMS = frozenset(name for name in SERVES if name.endswith("_norm") or "batch_norm" in name)
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Missing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, missing slices are left out wherever positions are put together.

    What is computed from weights alone (a weight over its norm, a softmax of gates) is reckoned twice, with and without
    what is missing. Where such a result serves as a weight, both must agree, or the cut changes the weight: a norm of a
    weight that is taken again over what is left is another norm.

    Args:
        weights: tensors of the model, of which slices were made NaN, each with the same tensor whole. What is whole
            stands for itself.
        gone: those of which slices were made NaN, each with dimension -> positions, so that nobody has to look.
        unmade: those of them whose slices become NaN only where somebody reads them.
        rewritten: is called when a run writes to a weight.

    Attributes:
        reduced: sizes of dimensions that were summed up, and how many of their positions were there; with the functions
            that did so.
        counted: sums that tell how many units there are.
        changed: lines of the user's code where a weight is used that is not what it was.

    Example:
        >>> weight = torch.tensor([1.0, float("nan"), 5.0])
        >>> with Missing():
        ...     weight.mean().item()
        3.0
    """

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, Tensor]] = (),
        gone: Sequence[tuple[Tensor, Mapping[int, Tensor]]] = (),
        unmade: Sequence[Unmade] = (),
        rewritten: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By identity, with the tensor itself beside it, so that no other can get its id while it stands here.
        self.given = {id(tensor): (tensor, whole) for tensor, whole in weights}
        self.whole = dict(self.given)
        self.stored = {t.untyped_storage()._cdata for t, _ in weights}
        self.poisoned = {t.untyped_storage()._cdata for t, whole in weights if t is not whole}
        self.reduced: dict[tuple[int, int], set[CodeType]] = {}
        self.counted = Counted()
        self.changed: set[str] = set()
        self.origins, self.bases = Origins(self.poisoned), Bases()
        self.activations: dict[int, Tensor] = {}  # of what was computed from weights alone
        self._absent: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        # Weights are the same in every run, so what was seen of them once holds.
        self._known: dict[tuple[object, ...], Tensor | None] = {}
        self._left: dict[tuple[object, ...], Tensor | None] = {}
        self._picked: dict[tuple[object, ...], Tensor] = {}
        for tensor, dims in gone:
            views = [(tensor.detach(), dims)]
            if tensor.dim() == 2:
                views.append((tensor.detach().t(), {1 - d: positions for d, positions in dims.items()}))
            for view, known in views:
                self._known.update(((*_place(view), d), known.get(d)) for d in range(view.dim()))
        self.unmade = {memory_of(each.tensor): each for each in unmade}
        self.rewritten = rewritten
        self._depth = 0

    def __enter__(self) -> Missing:
        """Begin a run, or a part of one: operators that are made of others come back here."""
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Forget what the run has made, once the outermost ends."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if self._depth == 0:
            self.whole = dict(self.given)
            self.activations.clear()
            self.origins.clear()
            self._absent.clear()
            self.bases.found.clear()

    def __torch_dispatch__(
        self, func: Op, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        kwargs = {} if kwargs is None else dict(kwargs)
        name, mutable = name_of(func)
        operands = tensors(args, kwargs)
        written = writes(func, args, kwargs) if mutable else []
        for tensor in written:
            if self.is_weight(tensor):
                self._forget(tensor)
        whole = self.whole
        if name in FORMS and any(id(t) not in whole for t in operands):
            return self._constant(self._run(name, func, args, kwargs, operands))
        if all(id(t) in whole for t in operands) and not self._is_a_layer(name, operands):
            return self._of_weights(func, args, kwargs, {id(t) for t in written})
        if name in PRODUCTS:
            self.origins.met.update(memory_of(t) for t in operands if id(t) in whole)
        for place in SERVES.get(name, ()):
            self._require_same(args[place] if place < len(args) else None)
        if name not in SERVES and (name in FILLS or torch.Tag.pointwise in func.tags):
            # A penalty may be added to another number, a loss; what is added to data is an offset like any other.
            several = any(tensor.numel() > 1 for tensor in operands)
            for tensor in operands:
                if id(tensor) not in self.activations or (several and tensor.numel() == 1):
                    self._require_same(tensor)
        for tensor in written:  # a statistic that is written in training depends on the data from now on
            self.bases.leave(tensor, whole, self.stored)
        result = self._run(name, func, args, kwargs, operands)
        for tensor in written:
            self.bases.blank(self, tensor)
        return result

    def _forget(self, weight: Tensor) -> None:
        """A run writes to a weight: what was known of any of them may not hold."""
        self._known.clear()
        self._left.clear()
        self._picked.clear()
        self.rewritten()
        if memory_of(weight) in self.unmade:
            self.unmade[memory_of(weight)].written = True

    def _constant(self, made: object) -> object:
        """What the code makes of no data is as good as a weight of which nothing is missing."""
        if isinstance(made, Tensor):
            self.whole[id(made)] = (made, made)
        return made

    def _is_a_layer(self, name: str, operands: Sequence[Tensor]) -> bool:
        """Whether a product is that of a layer with a learned token, which went through a norm as data would."""
        if name.startswith(ATTENDS):
            return any(self.origins.of(t).by_product for t in operands)
        return name in PRODUCTS and any(id(t) in self.activations for t in operands)

    def _of_weights(self, func: Op, args: Sequence[object], kwargs: Arguments, written: set[int]) -> object:
        """A weight or a constant, with and without what is missing."""
        known, (name, _) = self.whole, name_of(func)
        operands = tensors(args, kwargs)
        if all(known[id(t)][1] is t for t in operands):
            result = full = func(*args, **kwargs)
        elif name not in HANDLERS and is_composite(func):  # each of its parts is such an operator
            with self:
                return func.decompose(*args, **kwargs)
        else:
            full = self._masked(func, args, kwargs, written)
            result = self._run(name, func, args, kwargs)
        if not isinstance(result, (Tensor, tuple, list)):
            return full  # a number for Python: that of the original
        inherits = [t for t in operands if id(t) in self.activations]
        token = name in PRODUCTS and self.origins.is_token(name, args)
        for mine, other in zip(tensors((result,)), tensors((full,)), strict=True):
            known[id(mine)] = (mine, other)
            self.origins.made(mine, self, name, args, operands)
            # What was summed up to one number (a penalty, say) is that of the weights without what is removed.
            one = mine.numel() == 1 and (name == "sum" or bool(inherits) or self.origins.of(mine).by_product)
            if name in NORMS or token or one or any(t.numel() > 1 for t in inherits):
                self.activations[id(mine)] = mine
        return result

    def _masked(self, func: Op, args: Sequence[object], kwargs: Arguments, written: set[int]) -> object:
        """What the masked original computes: with weights that are whole, and without units that bring nothing."""

        def whole(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            found = self.whole[id(value)][1]
            return found.clone() if id(value) in written else found

        instead, named = pytree.tree_map(whole, (list(args), kwargs))
        for place, (d, gone) in self.origins.left_out(self, name_of(func)[0], args).items():
            instead[place] = instead[place].index_fill(d, gone, 0)
        return func(*instead, **named)

    def _require_same(self, weight: object) -> None:
        """Note where a computed weight is not, as far as it is there, what it is in the original."""
        if not isinstance(weight, Tensor) or weight.untyped_storage()._cdata in self.stored:
            return
        _, whole = self.whole.get(id(weight), (weight, weight))
        if whole is weight or not weight.is_floating_point():
            return
        error = torch.where(torch.isnan(weight), 0, weight - whole).abs().max()
        if float(error) > SAME[weight.dtype] * float(whole.abs().max()):
            self.changed.add(users_line())

    def _run(
        self, name: str, func: Op, args: Sequence[Any], kwargs: Arguments, operands: Sequence[Tensor] | None = None
    ) -> object:
        handler = HANDLERS.get(name)
        if handler is None and is_composite(func):  # whole in inference mode only: its parts are what is known here
            with self:
                return func.decompose(*args, **kwargs)
        operands = tensors(args, kwargs) if operands is None else operands
        waiting = bool(self.unmade) and any(memory_of(t) in self.unmade for t in operands)
        lean = waiting and self._in_parts(name, args)
        if waiting and not lean and name not in VIEWS:
            args, kwargs = [self.made(each) for each in args], {key: self.made(each) for key, each in kwargs.items()}
        if handler is not None:
            call = GapCall(func, args, kwargs, self.made if lean else None)
            if torch.Tag.nondeterministic_seeded in func.tags or _get_current_dispatch_mode() is None:
                return handler(self, call)
            with _disable_current_modes():  # who watches for chance need not look at every step of this
                return handler(self, call)
        changed = HANDLERS.get(name[:-1]) if name.endswith("_") else None
        if changed is not None:
            functional = getattr(torch.ops.aten, name[:-1])
            plain = getattr(functional, func._overloadname, None)
            if plain is not None:
                return args[0].copy_(changed(self, GapCall(plain, args, kwargs)))
        result = func(*args, **kwargs)
        if self._absent and isinstance(result, Tensor) and not can_be_nan(result):
            self._hand_on(func, args, kwargs, operands, result)
        return result

    def _hand_on(
        self, func: Op, args: Sequence[Any], kwargs: Arguments, operands: Sequence[Tensor], result: Tensor
    ) -> None:
        """What is missing of truth values and counts is missing of what is made of them, and of what is moved."""
        absent = {id(t): self.noted(t) for t in operands}
        if not any(absent.values()):
            return
        if torch.Tag.pointwise in func.tags:
            for tensor in operands:
                shift = result.dim() - tensor.dim()
                own = {d + shift: gone for d, gone in absent[id(tensor)].items()}
                if all(result.shape[d] == tensor.shape[d - shift] for d in own):
                    self.note(result, {**self.noted(result), **own})
        elif base_name(func) in MOVED:
            marked = [self._marked(a) if isinstance(a, Tensor) else a for a in args]
            self.note(result, self.anywhere(cast(Tensor, func(*marked, **kwargs))))

    def _marked(self, tensor: Tensor) -> Tensor:
        """Numbers of a tensor's form that are NaN where it misses something."""
        marks = torch.zeros(tensor.shape, device=tensor.device)
        for d, gone in self.noted(tensor).items():
            marks.index_fill_(d, gone, NAN)
        return marks

    def _in_parts(self, name: str, args: Sequence[Any]) -> bool:
        """Whether this is a product that takes a weight in parts, so that the whole of it need not be made."""
        at = LEAN.get(name)
        if at is None or (name == "convolution" and args[GROUPS] != 1):
            return False
        found = [self._unmade(value) is not None for value in args]
        return found.count(True) == 1 and found[at]

    def _unmade(self, value: object) -> Unmade | None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        found = self.unmade.get(memory_of(value))
        return None if found is None or found.written else found

    def made(self, value: Any) -> Any:
        """An argument whose missing slices are NaN."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.made, value)) if any(isinstance(each, Tensor) for each in value) else value
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        found = self.unmade.get(memory_of(value))
        if found is None:
            return value
        made = found.view(value)
        self.stored.add(memory_of(made))
        self.poisoned.add(memory_of(made))
        return made

    def of(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Ascending numbers of the missing positions of a dimension; None where nothing is missing."""
        if id(tensor) in self._absent:
            return self._absent[id(tensor)][1].get(dim % tensor.dim())
        if tensor.dim() == 0 or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
            return None
        if not self.is_weight(tensor):
            return look(tensor, dim)
        place = (*_place(tensor), dim % tensor.dim())
        if place not in self._known:
            self._known[place] = look(self.made(tensor), dim)
        return self._known[place]

    def left(self, weight: Tensor, dim: int) -> Tensor | None:
        """Positions of a weight's dimension that are there; None where all are, or none is."""
        place = (*_place(weight), dim % weight.dim())
        if place not in self._left:
            gone = self.of(weight, dim)
            some = gone is not None and len(gone) < weight.shape[dim]
            self._left[place] = others(weight.shape[dim], gone) if gone is not None and some else None
        return self._left[place]

    def picked(self, weight: Tensor, picks: Mapping[int, Tensor]) -> Tensor:
        """A weight at some positions of some dimensions, and no more of it than that."""
        whole = _place(weight)
        # Positions that are the weight's own are one tensor, and need not be read.
        own = ((d, stay, self._left.get((*whole, d))) for d, stay in picks.items())
        place = (*whole, *((d, None if stay is mine else stay.cpu().numpy().tobytes()) for d, stay, mine in own))
        if place not in self._picked:
            self._picked[place] = self._taken(weight, picks)
        return self._picked[place]

    def _taken(self, weight: Tensor, picks: Mapping[int, Tensor]) -> Tensor:
        unmade = self._unmade(weight)
        if unmade is not None:
            small = unmade.taken(weight, picks)
            if small is not None:
                return small
            gone = [d for d in range(weight.dim()) if self.of(weight, d) is not None]
            weight = weight if all(d in picks for d in gone) else self.made(weight)
        small = weight
        for d in sorted(picks, key=lambda d: -weight.stride()[d]):  # what lies together in memory goes first
            small = pick(small, d, picks[d])
        return small

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a weight of which something is missing."""
        return tensor.untyped_storage()._cdata in self.poisoned

    def note(self, tensor: Tensor, absent: dict[int, Tensor]) -> None:
        """Remember what is missing where NaN cannot say it: in truth values and counts."""
        self._absent[id(tensor)] = (tensor, absent)

    def noted(self, tensor: Tensor) -> dict[int, Tensor]:
        """What was remembered."""
        return self._absent[id(tensor)][1] if id(tensor) in self._absent else {}

    def counts(self, call: GapCall, whole: Tensor, dims: Sequence[int], kept: Mapping[int, Tensor]) -> bool:
        """Whether a sum tells how many units there are; weights that are alike at first will not stay so."""
        if not kept or id(whole) in self.whole:
            return False
        return self.counted.summed(name_of(call.func)[0], call.args[0], whole, dims, kept)

    def multiplies(self, one: Tensor, other: Tensor, along: int, summed: int, size: int) -> None:
        """As `Counted.multiplied`, of what no weight takes part in."""
        if not any(self.is_weight(t) or id(t) in self.whole for t in (one, other)):
            self.counted.multiplied(one, other, along, summed, size)

    def anywhere(self, tensor: Tensor) -> dict[int, Tensor]:
        """Dimension -> its missing positions, of the dimensions that miss some but not all."""
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0 or not has_nan(tensor):
            return {}
        found = ((d, self.of(tensor, d)) for d in range(tensor.dim()))
        return {d: gone for d, gone in found if gone is not None and len(gone) < tensor.shape[d]}


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
