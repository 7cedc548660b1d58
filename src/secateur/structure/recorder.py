"""What the engine remembers while a model runs: which tensor is which, what its dimensions are, where the run is."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.model.call import inputs, outputs, tensors_in
from secateur.model.memory import Saved, address_of
from secateur.model.modules import named_modules
from secateur.model.state import State
from secateur.structure.axes import Axis, Conflict, Space, leaves, lock, same_axis
from secateur.structure.conditions import Watch
from secateur.structure.here import Here
from secateur.structure.provenance import Expr, Found, is_literal
from secateur.structure.ran import Ways
from secateur.structure.trace import Axes, Place, SizeUse, Trace
from secateur.types import Example, Lock

StorageKey = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape, strides
Source = tuple[str, tuple[int, ...]]  # a parameter's name, and which of its dimensions each dimension is (-1 = none)
SHAPES = (
    "view",
    "reshape",
    "unflatten",
    "view_as",
    "reshape_as",
    "expand",
    "expand_as",
)  # say what dimensions there are


class OwnTensors:
    """The parameters and buffers of a model, and how they are recognised when the run meets them.

    Args:
        model: the model.
        aliases: is filled with every further name of a tied tensor -> its first name.
    """

    def __init__(self, model: nn.Module, aliases: dict[str, str]) -> None:
        self.by_id: dict[int, str] = {}
        # `weight.data` and the like are other Python objects over the same memory.
        self.by_storage: dict[StorageKey, str] = {}
        self.parameters: set[str] = set()
        self.held: list[Tensor] = []  # so that no id is given to another tensor while the run goes on
        parameters, buffers = [], []
        for path, module in model.named_modules(remove_duplicate=False):
            start = f"{path}." if path else ""
            parameters += [(start + name, p) for name, p in module._parameters.items() if p is not None]
            buffers += [(start + name, b) for name, b in module._buffers.items() if b is not None]
        self.parameters.update(name for name, _ in parameters)
        for name, tensor in (*parameters, *buffers):
            if id(tensor) in self.by_id:
                aliases[name] = self.by_id[id(tensor)]
                continue
            self.by_id[id(tensor)] = name
            self.held.append(tensor)
            if not tensor.is_meta and tensor.layout == torch.strided:  # without memory all have the address 0
                self.by_storage.setdefault(_storage_key(tensor), name)

    def name(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer; None for everything else."""
        name = self.by_id.get(id(tensor))
        if name is None and not tensor.is_meta and tensor.layout == torch.strided and tensor.numel() > 0:
            name = self.by_storage.get(_storage_key(tensor))
        return name


class TensorNumbers:
    """Tensor -> number, without keeping a tensor alive.

    An id is used again once its tensor is gone, so each entry knows whose it is. (torch's WeakIdKeyDictionary does the
    same, but makes a new reference at every look-up, which was an eighth of a capture.)
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def get(self, tensor: Tensor) -> int | None:
        """The number of a tensor that was numbered before."""
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def set(self, tensor: Tensor, number: int) -> None:
        """Number a tensor."""
        self._entries[id(tensor)] = (weakref.ref(tensor), number)

    def alive(self) -> list[int]:
        """Numbers of the tensors that somebody still holds."""
        return [number for tensor, number in self._entries.values() if tensor() is not None]


class Recorder:
    """Writes the trace while the run goes on; rules and handlers talk to it.

    Args:
        model: the model that is about to run.
        after: an earlier run of it, whose atoms this run shares.
        turned: see `Watch`.
    """

    def __init__(self, model: nn.Module, after: Recorder | None = None, turned: str = "") -> None:
        # The result, and the atoms in it.
        self.trace: Trace = Trace() if after is None else after.trace.another()
        self.known = {} if after is None else after.trace.tensors()
        # Module -> dimensions of the tensors that each of its runs returned, here and in the earlier run.
        self.returned: dict[str, list[list[Axes]]] = {}
        self.before = {} if after is None else after.returned
        self.space: Space = self.trace.space
        # Where the run is, and the modules that it goes through.
        self.here = Here()
        self.modules: dict[str, nn.Module] = dict(named_modules(model)) if after is None else after.modules
        self.integers: Found = {} if after is None else after.integers
        # Which tensor is which: the model's own by name, all by number.
        self.own: OwnTensors = OwnTensors(model, self.trace.aliases) if after is None else after.own
        self.numbers = TensorNumbers()
        self.named: dict[str, int] = {}  # `trace.names` the other way round
        # What rules found out about tensors, by number: moved parameters are still parameters, and results of argmax
        # and the like are positions in these dimensions, which a cut would shift.
        self.sources: dict[int, Source] = {}
        self.positions: dict[int, list[Axis]] = {}
        # Numbers of parameters and of what was made of parameters alone, as weights are. What went through a layer as
        # its input (learned tokens, queries) is not among them: it is data that happens to be learned.
        self.weights: set[int] = set()
        # Numbers of what depends on the input (or on chance), and atom -> which dimension of the input it is.
        self.data: set[int] = set()
        # Number of data behind a squeeze -> dimensions that it would have dropped, were they of size one.
        self.thin: dict[int, Axes] = {}
        self.input_names: dict[int, str] = {}
        self.lengths: set[int] = set()  # plain numbers that len() gave of what depends on the input
        self.watch = Watch(self, turned)
        self.ways: Ways = Ways() if after is None else after.ways  # that all the runs have gone
        # What the model ran on, and what a guard has kept of both, for a further run on the same.
        self.example: Example = None
        self.lent: State | None = None
        self.failed = ""  # why a run beside the first one ended early
        # Tensors made from plain sizes in the present call, until a handler says where their sizes come from.
        self.made: list[Axes] = []
        # Dimensions that the present call has cut between two seams, until a handler says where.
        self.opened: list[Axis] = []
        # What the run met from outside, and the values of those that it is about to write to.
        self.kept = Saved()

    # -- tensors and their axes -------------------------------------------------------------------------

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; one that was never seen is a parameter, a buffer or a constant."""
        found = self.numbers.get(tensor)
        if found is not None:
            return found
        name = self.own.name(tensor)
        if name is None:
            return self._add_constant(tensor)
        return self._add_named(tensor, name)

    def _add_named(self, tensor: Tensor, name: str) -> int:
        known = self.named.get(name)
        if known is not None:
            self.numbers.set(tensor, known)
            return known
        axes = self.known.get(name) or tuple(self.space.fresh(n) for n in tensor.shape)
        number = self.named[name] = self.assign(tensor, axes)
        self.kept.add(tensor)
        self.trace.names[number] = name
        self.sources[number] = (name, tuple(range(tensor.dim())))
        if name in self.own.parameters:
            self.weights.add(number)
        return number

    def _add_constant(self, tensor: Tensor) -> int:
        hint = "make it a parameter, a buffer or a module of its own, also where a function holds it"
        reason = Lock("a tensor that is neither parameter nor buffer has this size", module=self.here.module, hint=hint)
        number = self.assign(tensor, tuple(self.space.fresh(n, reason) for n in tensor.shape))
        self.trace.constants[number] = tensor
        self.kept.add(tensor)
        return number

    def assign(self, tensor: Tensor, axes: Axes) -> int:
        """Give a new tensor its number and axes."""
        number = len(self.trace.axes)
        self.numbers.set(tensor, number)
        self.trace.axes[number] = axes
        return number

    def axes(self, tensor: Tensor) -> Axes:
        """Dimensions of a tensor."""
        return self.trace.axes[self.number(tensor)]

    def follow_thin(self, given: Sequence[Tensor], produced: Sequence[int]) -> None:
        """What a call makes of squeezed data alone has as many dimensions as they have, unless it says how many."""
        if not self.thin or self.here.function in SHAPES:
            return
        data = [tensor for tensor in given if self.numbers.get(tensor) in self.data]
        most = max((tensor.dim() for tensor in data), default=0)
        found = [self.thin.get(self.number(tensor), ()) for tensor in data if tensor.dim() == most]
        if found and all(found):
            self.thin.update(dict.fromkeys(produced, found[0]))

    def add_inputs(self, example: Example) -> None:
        """Inputs are data: their dimensions are never cut."""
        for tensor in inputs(example):
            if id(tensor) in self.own.by_id or self.numbers.get(tensor) is not None:
                continue
            reason = Lock("a dimension of the model's input")
            number = self.assign(tensor, tuple(self.space.fresh(n, reason) for n in tensor.shape))
            self.trace.constants[number] = tensor
            self.kept.add(tensor)
            self.data.add(number)
            for d, axis in enumerate(self.trace.axes[number]):
                place = f" {len(self.trace.inputs)}" if self.trace.inputs else ""
                self.input_names.update({atom.id: f"dimension {d} of input{place}" for atom in leaves(axis)})
            self.trace.inputs.append(number)

    def add_outputs(self, result: object) -> None:
        """Outputs are what the user relies on: protected."""
        for tensor in outputs(result):
            number = self.number(tensor)
            self.trace.outputs.append(number)
            for axis in (*self.trace.axes[number], *self.positions.get(number, ())):
                lock(axis, Lock("a dimension of the model's output", hint="outputs are protected by default"))

    def add_left(self) -> None:
        """After a run: what it made and is still there is held by the model, a list or a hook, and read by somebody."""
        known = {*self.trace.outputs, *self.trace.inputs, *self.trace.constants}
        self.trace.left.extend(number for number in self.numbers.alive() if number not in known)

    def leave(self, module: str, result: object) -> None:
        """A module returned; where that ends a branch that leads to the same dimensions, the rest is known.

        Raises:
            Rejoined: from here on this run would be the earlier one.
        """
        self.ways.modules.add(module)
        if module == "" or result is None:
            return
        here = [self.axes(tensor) for tensor in tensors_in(result)]
        runs = self.returned.setdefault(module, [])
        runs.append(here)
        if self.watch.turned_in == module:
            before = self.before.get(module, [])
            if len(before) >= len(runs) and _alike(before[len(runs) - 1], here):
                raise Rejoined

    # -- what the run leaves as it was -------------------------------------------------------------------

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Undo what the run writes to parameters, buffers, inputs and other tensors from outside."""
        try:
            yield
        finally:
            self.kept.put_back()

    # -- what rules and handlers use ---------------------------------------------------------------------

    def reason(self, text: str, hint: str = "") -> Lock:
        """A lock that points to the present place."""
        place = self.here.place()
        return Lock(text, place.op, place.module, place.where, hint)

    def unify(self, a: Axis, b: Axis) -> None:
        """Two dimensions are indexed alike; where that has no common structure, both are locked."""
        try:
            self.space.unify(a, b)
        except Conflict:
            reason = self.reason("two dimensions meet here whose structures do not line up")
            lock(a, reason)
            lock(b, reason)

    def equality(self, expr: Expr) -> None:
        """The code compared two sizes, found them equal and went on accordingly."""
        if self.here.function:  # inside torch, where sizes are plain numbers; the function's handler knows better
            return
        if not is_literal(expr):
            here = self.here.place()
            self.trace.size_uses.append(SizeUse(expr, 1, Place("==", here.module, here.where)))

    def settle_made(self) -> None:
        """Lock the dimensions of tensors made in this call whose sizes no handler could account for."""
        for axes in self.made:
            for axis in axes:
                lock(axis, self.reason("a tensor is made here with a size from the code"))
        self.made.clear()


class Rejoined(BaseException):
    """A run along another branch is back where the earlier run was. No code of a model catches it."""


def _alike(a: Sequence[Axes], b: Sequence[Axes]) -> bool:
    """Whether tensors have the same dimensions, and not only equal sizes."""
    return len(a) == len(b) and all(
        len(x) == len(y) and all(same_axis(i, j) for i, j in zip(x, y, strict=True)) for x, y in zip(a, b, strict=True)
    )


def _storage_key(tensor: Tensor) -> StorageKey:
    # Shape and strides too: two views of one storage are two tensors.
    return address_of(tensor), tuple(tensor.shape), tuple(tensor.stride())
