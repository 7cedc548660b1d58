"""The one way to give a model, the random generators and the example back as they were.

Everything that runs a user's model runs inside `guard`. What a forward, a criterion or a proof leaves behind (a
training flag, a hook, a counter in a buffer, a cache in an attribute, a number drawn from a generator) is then undone,
also where an exception passes.
"""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from secateur.model.call import tensors_in
from secateur.model.tensors import has_values
from secateur.types import Example

Mode = Literal["eval", "train"]
_TensorHooks = dict[int, object] | None
K = TypeVar("K")
V = TypeVar("V")
# What torch itself keeps in every module: looked up by name, since walking it would be most of the cost of a guard.
_OWN = {name: value for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}
_hooks_of = itemgetter(*(name for name in _OWN if "hooks" in name))
_contents_of = itemgetter(*(name for name in _OWN if "hooks" not in name))
_NAMES = frozenset(vars(nn.Module()))
# Exact types: a subclass may do something else when it is copied or cleared.
_WALKED = frozenset({dict, OrderedDict, defaultdict, list, deque, set, tuple})
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def guard(
    *models: nn.Module,
    mode: Mode | None = None,
    gradients: bool | None = None,
    seed: int | None = None,
    example: Example = None,
    copies: bool = True,
    rollback: bool = False,
) -> Iterator[None]:
    """Run a block, and give back what it was lent, bit for bit, also when an exception passes through.

    Put back are, of every module: training flags, hooks, parameters and buffers by identity (those that were replaced,
    registered anew or deleted), the values of buffers, and attributes, with the lists, mappings, sets and tensors in
    them; of every tensor: requires_grad, hooks and the gradient, which is put aside meanwhile so that no backward pass
    adds to it; the grad mode; the generators of Python, NumPy, torch and CUDA; and the tensors of the example.

    Not put back: weights that the block writes to (see `rollback`), what objects of other classes hold, and what the
    first forward makes of lazy modules.

    Args:
        models: what is lent; modules that they share count once.
        mode: "eval" sets every flag itself, so that a model that overrides ``train()`` cannot keep some of its layers
            in training; "train" calls ``train()``, so that such a model can keep its norms frozen; None = as it is.
        gradients: grad mode inside; None = as it is.
        seed: seeds all generators on entry; None = they go on from where they are.
        example: what the block runs the models on.
        copies: False = the values of buffers, attributes and example are not kept, for callers that undo writes
            themselves or stand inside another guard. All else comes back.
        rollback: for training: weights, buffers and attributes stay as the block leaves them, unless an exception
            passes; then the weights come back too.

    Cost:
        A copy of the buffers and the example and, with `rollback`, of the weights; one comparison of each copy at the
        end. Without copies about 15 microseconds per module, whatever the size of the model.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with guard(layer, mode="eval"):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    state = _State(models, example, copies=copies or rollback, weights=rollback)
    with generators(seed), _grad_mode(gradients):
        failed = True
        try:
            state.put_aside()
            _enter(models, mode)
            yield
            failed = False
        finally:
            state.put_back(everything=failed or not rollback)


def evaluating(*models: nn.Module, example: Example = None) -> AbstractContextManager[None]:
    """A `guard` in eval mode without gradients."""
    return guard(*models, mode="eval", gradients=False, example=example)


@contextmanager
def generators(seed: int | None = None) -> Iterator[None]:
    """The random generators of Python, NumPy and torch (CPU and all CUDA devices), put back at the end.

    Args:
        seed: seeds all of them on entry; None = they go on from where they are.
    """
    started = _cuda_started()
    cuda = torch.cuda.get_rng_state_all() if started else []
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    initial = torch.initial_seed()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - data of the user may draw from the global generator
            torch.manual_seed(seed)
        yield
    finally:
        if started:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_available() and (seed is not None or _cuda_started()):
            # CUDA that was not started has no state yet, and asking for it would have started it: it gets the seed
            # with which it would have started.
            torch.cuda.manual_seed_all(initial)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)


def _cuda_started() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def _grad_mode(gradients: bool | None) -> Iterator[None]:
    before = torch.is_grad_enabled()
    try:
        if gradients is not None:
            torch.set_grad_enabled(gradients)
        yield
    finally:
        torch.set_grad_enabled(before)


def _enter(models: Iterable[nn.Module], mode: Mode | None) -> None:
    for model in models:
        if mode == "train":
            model.train()
        elif mode == "eval":
            for module in model.modules():
                if module.training:
                    module.training = False


@dataclass(frozen=True, eq=False)
class _Values:
    """What a tensor held."""

    tensor: Tensor
    memory: Tensor  # another handle on the same memory, for the case that the tensor is given other memory
    copy: Tensor

    @staticmethod
    def of(tensor: Tensor) -> _Values:
        memory = tensor.detach()
        return _Values(tensor, memory, _without_repeats(memory).clone())

    def put_back(self) -> None:
        with torch.no_grad():
            if self.tensor.layout == torch.strided and not self.tensor.is_set_to(self.memory):
                self.tensor.data = self.memory
            now = _without_repeats(self.memory)
            # Compared by value: batch norm writes its statistics without counting up their version. Written only
            # where something differs: a tensor in memory that may not be written is left alone.
            if not _same_bits(now, self.copy):
                now.copy_(self.copy)


@dataclass(frozen=True, eq=False)
class _Flags:
    """What autograd knows of a leaf tensor."""

    tensor: Tensor
    requires_grad: bool
    gradient: Tensor | None
    hooks: tuple[_TensorHooks, _TensorHooks]

    @staticmethod
    def of(tensor: Tensor) -> _Flags:
        backward, accumulated = _hooks(tensor)
        hooks = (dict(backward) if backward else None, dict(accumulated) if accumulated else None)
        return _Flags(tensor, tensor.requires_grad, tensor.grad, hooks)

    def put_back(self) -> None:
        tensor = self.tensor
        if not tensor.is_leaf:  # an in-place operation has made the tensor part of a graph
            tensor.detach_()
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if tensor.grad is not self.gradient:
            tensor.grad = self.gradient
        for live, before in zip(_hooks(tensor), self.hooks, strict=True):
            if live is not None:
                refill(live, before or {})


class _State:
    """Modules, their containers and tensors as they are now."""

    def __init__(self, models: Iterable[nn.Module], example: Example, *, copies: bool, weights: bool) -> None:
        self.training: list[tuple[nn.Module, bool]] = []
        self.hooks = _Containers()
        self.attributes = _Containers()
        self.parameters: dict[int, Tensor] = {}
        self.tensors: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._kinds: dict[type, _Kind] = {}
        for model in models:
            self._visit(model)
            if isinstance(model, torch.jit.ScriptModule):  # holds its tensors in C++, where no walk finds them
                self.parameters.update((id(tensor), tensor) for tensor in model.parameters())
                self.tensors.update((id(tensor), tensor) for tensor in model.buffers())
        self.tensors.update((id(tensor), tensor) for tensor in tensors_in(example))
        leaves = [t for t in (*self.parameters.values(), *self.tensors.values()) if t.is_leaf]
        self.flags = [_Flags.of(tensor) for tensor in leaves]
        self.values = [_Values.of(tensor) for tensor in self._copied(weights)] if copies else []

    def put_aside(self) -> None:
        """Take the gradients off the tensors."""
        for flags in self.flags:
            if flags.gradient is not None:
                flags.tensor.grad = None

    def put_back(self, *, everything: bool) -> None:
        """Undo what has changed; values, attributes and what stands under each name only with `everything`."""
        if everything:
            self.attributes.put_back()
            for values in self.values:
                values.put_back()
        self.hooks.put_back()
        for flags in self.flags:
            flags.put_back()
        for module, training in self.training:
            if module.training != training:
                module.training = training

    def _copied(self, weights: bool) -> Iterator[Tensor]:
        if weights:
            yield from filter(has_values, self.parameters.values())
        # What lies in the memory of a weight (a view, the flat list of a recurrent layer) has no values of its own:
        # without `weights` nothing of the size of the weights is copied.
        memory = {_memory(tensor) for tensor in self.parameters.values()} if self.tensors else set()
        for tensor in self.tensors.values():
            if has_values(tensor) and _memory(tensor) not in memory:
                yield tensor

    def _visit(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self.training.append((module, module.training))
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            return  # the first forward makes it a module of another class, for which its old attributes are wrong
        attributes = vars(module)
        self.attributes.add(attributes)
        rest = set(attributes)
        if attributes.keys() >= _NAMES:
            self.hooks.add_all(_hooks_of(attributes))
            contents = _contents_of(attributes)
            self.attributes.empty.append(tuple(each for each in contents if not each))
            for each in contents:
                if each:
                    self._walk(each)
            rest -= _NAMES  # of modules that are scripted or come from an older torch, all are walked
        for name in rest:
            self._walk(attributes[name])
        if isinstance(module, torch.jit.ScriptModule):
            for child in module.children():
                self._visit(child)

    def _walk(self, value: object) -> None:
        """Keep a container and what is in it; modules that are held in plain lists are no submodules, but belong."""
        kind = self._kinds.get(type(value))
        if kind is None:
            # Asked once per class: on tensors and modules isinstance is slow, and most values are plain.
            kind = self._kinds[type(value)] = _kind(value)
        if kind == "plain":
            return
        if kind == "module":
            self._visit(cast(nn.Module, value))
        elif kind == "parameter":
            self.parameters[id(value)] = cast(Tensor, value)
        elif kind == "tensor":
            tensor = cast(Tensor, value)
            if isinstance(value, nn.Parameter):  # of a class of tensors that marks its parameters one by one
                self.parameters[id(value)] = tensor
            elif tensor.is_leaf:  # others are results, for example a normalised weight, and are computed anew
                self.tensors[id(value)] = tensor
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            for item in self.attributes.add(value):
                self._walk(item)


_Kind = Literal["plain", "module", "parameter", "tensor", "container"]


def _kind(value: object) -> _Kind:
    if isinstance(value, nn.Module):
        return "module"
    if isinstance(value, Tensor):
        return "parameter" if type(value) is nn.Parameter else "tensor"
    return "container" if type(value) in _WALKED else "plain"


class _Containers:
    """Lists, mappings and sets, and what was in them."""

    def __init__(self) -> None:
        self.empty: list[tuple[dict[object, object] | set[object], ...]] = []
        self.mappings: list[tuple[dict[object, object], dict[object, object]]] = []
        self.sequences: list[tuple[list[object] | deque[object], tuple[object, ...]]] = []
        self.sets: list[tuple[set[object], frozenset[object]]] = []

    def add_all(self, mappings: tuple[dict[object, object], ...]) -> None:
        """Keep several, most of which are empty."""
        if not any(mappings):
            self.empty.append(mappings)
            return
        for mapping in mappings:
            self.mappings.append((mapping, dict(mapping)))

    def add(self, value: object) -> Iterable[object]:
        """Keep one, and return what is in it."""
        if isinstance(value, dict):
            self.mappings.append((value, dict(value)))
            return value.values()
        if isinstance(value, (list, deque)):
            self.sequences.append((value, tuple(value)))
            return value
        if isinstance(value, set):
            self.sets.append((value, frozenset(value)))
        return value if isinstance(value, tuple) else ()

    def put_back(self) -> None:
        """Refill the containers that have changed. Compared by identity: tensors have no ``==``."""
        for containers in self.empty:
            if any(containers):
                for container in containers:
                    container.clear()
        for live, before in self.mappings:
            refill(live, before)
        for sequence, items in self.sequences:
            if len(sequence) != len(items) or not all(map(is_, sequence, items)):
                sequence.clear()
                sequence.extend(items)
        for members, known in self.sets:
            if members != known:
                members.clear()
                members.update(known)


def refill(live: dict[K, V], before: dict[K, V]) -> None:
    """Bring a mapping back to its entries, in their order."""
    same = len(live) == len(before) and all(map(is_, live, before)) and all(map(is_, live.values(), before.values()))
    if not same:
        live.clear()
        live.update(before)


def _hooks(tensor: Tensor) -> tuple[_TensorHooks, _TensorHooks]:
    return cast(_TensorHooks, tensor._backward_hooks), tensor._post_accumulate_grad_hooks


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # layouts without one storage
        return id(tensor)


def _without_repeats(tensor: Tensor) -> Tensor:
    """One of each: expanded dimensions say the same many times, and can be neither copied cheaply nor written."""
    if tensor.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if size > 1 and stride == 0:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits: NaN equals itself, and 0.0 is not -0.0."""
    if a.layout != torch.strided or a.is_quantized:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    bits = _BITS.get(a.element_size())
    return torch.equal(a, b) if bits is None else torch.equal(a.view(bits), b.view(bits))
