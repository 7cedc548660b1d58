"""What a model is at one moment, beside the values of its weights, and how it becomes that again."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from io import IOBase
from operator import itemgetter
from types import CellType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import _disable_current_modes

from secateur.model.call import require_input, tensors_in
from secateur.model.containers import Containers, refill
from secateur.model.memory import Contents, memory_of
from secateur.model.moving import Moving, undo_stream
from secateur.model.reach import (
    CONTAINERS,
    Kind,
    base_of,
    globals_of,
    inside,
    is_still,
    kind_of,
    slots_of,
    user_classes,
)
from secateur.model.tensors import has_values
from secateur.model.undo import LruCache, Undo, undo_answers, undo_array, undo_random, undo_variable
from secateur.types import Example

_TensorHooks = dict[int, object] | None
# What torch itself keeps in every module: looked up by name, since walking it would be most of the cost of a guard.
_OWN = {name: value for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}
_hooks_of = itemgetter(*(name for name in _OWN if "hooks" in name))
_contents_of = itemgetter(*(name for name in _OWN if "hooks" not in name))
_NAMES = frozenset(vars(nn.Module()))
_MISSING = object()


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


class State:
    """Modules, their containers and tensors as they are now.

    Args:
        models: what is lent.
        example: what they will be run on.
        copies: whether values of buffers, tensors and arrays are kept.
        weights: whether those of parameters are kept too.
    """

    def __init__(self, models: Iterable[nn.Module], example: Example, *, copies: bool, weights: bool) -> None:
        self.training: list[tuple[nn.Module, bool]] = []
        self.hooks = Containers()
        self.attributes = Containers()
        self.generators: list[object] = []  # that the model holds
        self.undo: list[Undo] = []  # of what is neither container nor tensor
        self.moving = Moving()
        self.parameters: dict[int, Tensor] = {}
        self.tensors: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._names: set[tuple[int, str]] = set()
        self._kinds: dict[type, Kind] = {}
        self._buffers: set[int] = set()
        self._still = False  # whether it was looked at since, and nothing had moved
        for model in models:
            self._visit(model)
            if isinstance(model, torch.jit.ScriptModule):  # holds its tensors in C++, where no walk finds them
                self.parameters.update((id(tensor), tensor) for tensor in model.parameters())
                self.tensors.update((id(tensor), tensor) for tensor in model.buffers())
                self._buffers.update(id(tensor) for tensor in model.buffers())
        self._own = frozenset(self._buffers)  # without those of the example
        require_input(example)
        self._walk(example)
        self.tensors.update((id(tensor), tensor) for tensor in tensors_in(example))
        leaves = [t for t in (*self.parameters.values(), *self.tensors.values()) if t.is_leaf]
        self.flags = [_Flags.of(tensor) for tensor in leaves]
        kept = list(self._copied(weights))
        # Of weights that are not copied too: which memory they lie in, as a forward may give them other.
        rest = {id(tensor) for tensor in kept} if weights else set()
        own = filter(has_values, self.parameters.values())
        with _disable_current_modes():  # to look, and to copy, is no part of a run
            self.values = [Contents(tensor, copied=copies) for tensor in kept]
            self.values += [Contents(tensor, copied=False) for tensor in own if id(tensor) not in rest]

    def put_aside(self, *, iterators: bool = True) -> None:
        """Take the gradients off the tensors, and put twins in the place of iterators.

        Raises:
            UnsupportedError: an iterator can be neither copied nor moved back.
        """
        self._still = False
        if iterators:
            self.moving.put_aside()
        for flags in self.flags:
            if flags.gradient is not None:
                flags.tensor.grad = None

    def put_back(self, *, everything: bool) -> None:
        """Undo what has changed; values, attributes and what stands under each name only with `everything`."""
        if everything:
            if not self._still:
                self.attributes.put_back()
            for undo in self.undo:
                undo()
            for values in self.values:
                if not self._still or id(values.tensor) not in self._own:
                    values.put_back()
        self._still = False
        self.hooks.put_back()
        for flags in self.flags:
            flags.put_back()
        for module, training in self.training:
            if module.training != training:
                module.training = training
        self.moving.check()

    def moved(self) -> bool:
        """Whether a forward has left something behind: an attribute, an entry of a container, a value of a buffer.

        Tensors of the example do not count. Where nothing has moved, `put_back` does not look again at what was looked
        at here: to be asked after the run.
        """
        written = any(values.changed() for values in self.values if id(values.tensor) in self._own)
        self._still = not written and not self.attributes.changed()
        return not self._still

    def renewed(self, modules: Iterable[nn.Module]) -> State:
        """The same, with the attributes of some of its modules as they are now, in which nothing new is to be kept."""
        other = copy.copy(self)
        other.attributes = self.attributes.renewed({id(vars(module)) for module in modules})
        return other

    def _copied(self, weights: bool) -> Iterator[Tensor]:
        if weights:
            yield from filter(has_values, self.parameters.values())
        # What lies in the memory of a weight (a view, the flat list of a recurrent layer) has no values of its own:
        # without `weights` nothing of the size of the weights is copied.
        memory = {memory_of(tensor) for tensor in self.parameters.values()} if self.tensors else set()
        for tensor in self.tensors.values():
            if has_values(tensor) and memory_of(tensor) not in memory:
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
        self._buffers.update(map(id, (attributes.get("_buffers") or {}).values()))
        rest = set(attributes)
        if attributes.keys() >= _NAMES:
            hooks = _hooks_of(attributes)
            self.hooks.add_all(hooks)
            for each in filter(None, hooks):
                for hook in list(each.values()) if isinstance(each, dict) else ():
                    self._walk(hook)
            contents = _contents_of(attributes)
            self.attributes.empty.append(tuple(each for each in contents if not each))
            for each in contents:
                if each:
                    self._walk(each)
            rest -= _NAMES  # of modules that are scripted or come from an older torch, all are walked
        for name in rest:
            if self._kinds.get(type(attributes[name])) != "plain":  # asked here too: most are
                self._walk(attributes[name])
        self.moving.claim(attributes.items(), attributes.__setitem__)
        self._visit_class(type(module))
        if isinstance(module, torch.jit.ScriptModule):
            for child in module.children():
                self._visit(child)

    def _visit_class(self, kind: type) -> None:
        """Keep what a class holds for all its instances, and the variables that its methods use."""
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        for base in user_classes(kind):
            names = [name for name in vars(base) if not (name.startswith("__") and name.endswith("__"))]
            before = {name: vars(base)[name] for name in names}
            self.undo.append(lambda base=base, before=before: _refill_class(base, before))  # type: ignore[misc]
            for value in list(vars(base).values()):  # __call__ has a closure as well
                if type(value) is not FunctionType or not is_still(value):
                    self._walk(value)
            self.moving.claim(before.items(), partial(setattr, base))

    def _keep_name(self, space: dict[str, object], name: str) -> None:
        value = space.get(name, _MISSING)
        if value is not _MISSING and (id(space), name) not in self._names:
            self._names.add((id(space), name))
            self.undo.append(lambda: space.__setitem__(name, value) if space.get(name) is not value else None)
            self._walk(value)
            self.moving.claim([(name, value)], space.__setitem__)

    def _walk(self, value: object) -> None:
        """Keep a value and what is in it; modules that are held in plain lists are no submodules, but belong."""
        kind = self._kinds.get(type(value))
        if kind is None:
            # Asked once per class: on tensors and modules isinstance is slow, and most values are plain.
            kind = self._kinds[type(value)] = kind_of(value)
        if kind == "plain":
            return
        if kind == "module":
            self._visit(cast(nn.Module, value))
        elif kind == "moving" and not isinstance(value, IOBase):
            self.moving.met(value)
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
            self._walk_inside(value, kind)

    def _walk_inside(self, value: object, kind: Kind) -> None:
        if kind == "container":
            for item in self.attributes.add(value):
                if self._kinds.get(type(item)) != "plain":
                    self._walk(item)
            self._claim_items(value)
        elif kind == "moving":
            self.undo.append(undo_stream(value))
        elif kind == "array":
            self.undo.append(undo_array(value))
        elif kind == "random":
            self.generators.append(value)
            self.undo.append(undo_random(value))
        elif kind == "function":
            self._walk_function(value)
        elif kind == "answers":
            self.undo.append(undo_answers(cast("LruCache", value)))
            self._walk(getattr(value, "__wrapped__", None))
        elif kind == "variable":
            variable = cast("ContextVar[object]", value)
            self.undo.append(undo_variable(variable))
            self._walk(variable.get(None))
        elif kind == "local":
            for item in self.attributes.add(vars(value)):  # of this thread
                self._walk(item)
        if kind == "object" or (kind == "container" and type(value) not in CONTAINERS):
            self._walk_object(value)

    def _claim_items(self, container: object) -> None:
        if not self.moving.waits:
            return
        base: Any = base_of(container)
        if isinstance(container, dict):
            self.moving.claim(
                base.items(container), lambda key, other: base.__setitem__(container, key, other), apart=True
            )
        elif isinstance(container, (list, deque)):
            items = enumerate(base.__iter__(container))
            self.moving.claim(items, lambda place, other: base.__setitem__(container, place, other), apart=True)

    def _walk_function(self, value: object) -> None:
        for part in inside(value):
            if not isinstance(part, CellType):
                self._walk(part)
                continue
            try:
                held = part.cell_contents
            except ValueError:  # a variable that is not bound yet
                continue
            if id(part) not in self._seen:
                self._seen.add(id(part))
                self.undo.append(lambda part=part, held=held: _refill_cell(part, held))  # type: ignore[misc]
                self._walk(held)
                self.moving.claim([(part, held)], _refill_cell)
        if isinstance(value, FunctionType):
            for space, name in globals_of(value):
                self._keep_name(space, name)

    def _walk_object(self, value: object) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            for item in self.attributes.add(attributes):
                self._walk(item)
            self.moving.claim(attributes.items(), attributes.__setitem__, apart=True)
        for name in list(slots_of(value)):
            held = getattr(value, name)
            self.undo.append(lambda name=name, held=held: _refill_slot(value, name, held))  # type: ignore[misc]
            self._walk(held)
            self.moving.claim([(name, held)], partial(_refill_slot, value), apart=True)
        if not isinstance(value, type):
            self._visit_class(type(value))


def _refill_class(kind: type, before: dict[str, object]) -> None:
    now = vars(kind)
    for name in [name for name in now if name not in before and not name.startswith("__")]:
        delattr(kind, name)
    for name, value in before.items():
        if now.get(name, _MISSING) is not value:
            setattr(kind, name, value)


def _refill_cell(cell: CellType, value: object) -> None:
    cell.cell_contents = value


def _refill_slot(owner: object, name: str, value: object) -> None:
    if getattr(owner, name, _MISSING) is not value:
        object.__setattr__(owner, name, value)  # its class may be frozen


def _hooks(tensor: Tensor) -> tuple[_TensorHooks, _TensorHooks]:
    return cast(_TensorHooks, tensor._backward_hooks), tensor._post_accumulate_grad_hooks
