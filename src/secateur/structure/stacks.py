"""Layers found by execution: repeated blocks that read a hidden state and hand on one of the same shape."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from secateur.measure.macs import macs_by_module
from secateur.model.call import call
from secateur.structure.capture import quiet, tensors_of
from secateur.structure.groups import protected_tensors
from secateur.types import Example, Lock

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "dot", "einsum", "grouped_mm")
MIXING = (*PRODUCTS, "convolution", "conv", "scaled_dot_product", "embedding", "lstm", "gru", "rnn")


@dataclass(frozen=True, eq=False)
class StackBlock:
    """One element of a stack.

    Args:
        index: its place in the stack.
        name: qualified name of the module.
        parameters: names of the parameters that nothing outside the block holds.
        macs: multiply-accumulates of one forward pass through it on the example.
        channel_dim: dimension of the hidden state that holds the features.
        locks: why it may not be removed; empty = free.
    """

    index: int
    name: str
    parameters: tuple[str, ...]
    macs: int
    channel_dim: int = -1
    locks: tuple[Lock, ...] = ()


@dataclass(frozen=True, eq=False)
class Stack:
    """A ModuleList or Sequential whose elements run one after the other.

    Args:
        path: qualified name of the container.
        blocks: all its elements, in order.
    """

    path: str
    blocks: tuple[StackBlock, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.blocks)

    @property
    def free(self) -> list[int]:
        """Places of the blocks that may be removed."""
        return [block.index for block in self.blocks if not block.locks]

    def locked(self, reasons: Mapping[int, Lock]) -> Stack:
        """The same stack with further blocks locked."""
        blocks = (replace(b, locks=(*b.locks, reasons[b.index])) if b.index in reasons else b for b in self.blocks)
        return Stack(self.path, tuple(blocks))


@dataclass(frozen=True, eq=False)
class Depth:
    """What a model holds in depth.

    Args:
        stacks: its stacks, in the model's order.
        macs: multiply-accumulates of one forward pass of the whole model on the example.
    """

    stacks: tuple[Stack, ...]
    macs: int


def find_stacks(model: nn.Module, example: Example, protect: Sequence[str] = ()) -> Depth:
    """Find every stack of removable blocks.

    A block is removable where it runs once, its first tensor result has the shape of its first tensor argument, and
    its input reaches its output on a path without any product or convolution (the residual path) beside one that has
    some: then leaving it out keeps the hidden state meaningful. Of nested stacks the outermost is taken.

    Args:
        model: left as it is.
        example: what `secateur.model.call.call` takes.
        protect: patterns of module or parameter names, or "type:ClassName", that stay.

    Returns:
        stacks with at least two blocks that qualify by themselves, in the model's order; locked blocks say why.

    Raises:
        ForwardError: the forward fails on the example.
        RecipeError: a pattern of `protect` matches nothing.

    Cost: two forward passes plus about 20 microseconds per operation.
    """
    containers = {path: module for path, module in model.named_modules() if _is_container(module)}
    watch = _Watch({f"{path}.{i}" if path else str(i): m for path, c in containers.items() for i, m in _numbered(c)})
    with quiet(model), torch.no_grad(), watch.hooks(), watch:
        call(model, example)
    costs = macs_by_module(model, example)
    guarded = protected_tensors(model, dict(model.named_parameters()), protect)
    names = {id(module): name for name, module in model.named_modules()}
    held = _holders(model)
    stacks = []
    for path, container in containers.items():
        blocks = []
        for i, module in _numbered(container):
            name, own = names[id(module)], _own_parameters(model, module)
            seen = watch.seen.get(id(module), _Seen())
            locks = [*_reasons(seen, name), *(guarded[p] for p in own[:1] if p in guarded)]
            if not locks and (touched := [guarded[p] for p in own if p in guarded]):
                locks = touched[:1]
            if held[id(module)] > 1:
                locks.append(Lock("the block stands in several places of the model", module=name))
            blocks.append(StackBlock(i, name, tuple(own), costs.get(name, 0), seen.channel_dim, tuple(locks[:1])))
        stack = Stack(path, tuple(blocks))
        if sum(not _reasons(watch.seen.get(id(m), _Seen()), "") for _, m in _numbered(container)) > 1:
            stacks.append(_in_order(stack, watch))
    return Depth(tuple(s for s in stacks if not any(_inside(s, other) for other in stacks)), costs[""])


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1


def _numbered(container: nn.Module) -> list[tuple[int, nn.Module]]:
    return list(enumerate(container.children())) if len(set(container.children())) == len(container._modules) else []


def _holders(model: nn.Module) -> dict[int, int]:
    """Module id -> under how many names the model reaches it."""
    counts: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        counts[id(module)] = counts.get(id(module), 0) + 1
    return counts


def _own_parameters(model: nn.Module, block: nn.Module) -> list[str]:
    inside = {id(p) for p in block.parameters()}
    within = {id(module) for module in block.modules()}
    for module in model.modules():
        if id(module) not in within:
            inside -= {id(p) for p in module.parameters(recurse=False)}
    return [name for name, p in model.named_parameters() if id(p) in inside]


def _inside(stack: Stack, other: Stack) -> bool:
    return any(stack.path == b.name or stack.path.startswith(f"{b.name}.") for b in other.blocks if not b.locks)


def _reasons(seen: _Seen, name: str) -> list[Lock]:
    if seen.calls == 0:
        return [Lock("the block does not run on the example", module=name)]
    if seen.calls > 1:
        return [Lock("the block runs several times in one forward pass", module=name)]
    if not seen.same_shape:
        return [Lock("the block's output has not the shape of its input", module=name)]
    if not seen.mixes:
        return [Lock("the block holds no product or convolution", module=name)]
    if not seen.residual:
        hint = "remove its channels instead"
        return [Lock("the block has no residual path from its input to its output", module=name, hint=hint)]
    return []


def _in_order(stack: Stack, watch: _Watch) -> Stack:
    turns = {b.index: watch.turn.get(b.name, -1) for b in stack.blocks if not b.locks}
    if list(turns.values()) == sorted(turns.values()):
        return stack
    reason = Lock("the blocks do not run in their order", module=stack.path)
    return stack.locked(dict.fromkeys(turns, reason))


@dataclass
class _Seen:
    """What was seen of one module."""

    calls: int = 0
    same_shape: bool = False
    residual: bool = False
    mixes: bool = False
    channel_dim: int = -1


@dataclass(eq=False)
class _Watch(TorchDispatchMode):
    """Follows which block's input reaches a tensor without a product or convolution in between."""

    modules: Mapping[str, nn.Module]
    seen: dict[int, _Seen] = field(default_factory=dict)
    turn: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.marks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.active: list[int] = []
        self.shapes: dict[int, torch.Size | None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.lstrip("_")
        if any(name == word or name.startswith((f"{word}_", f"{word}.")) for word in MIXING):
            for key in self.active:
                self.seen[key].mixes = True
            return result
        marks = frozenset().union(*(self._of(t) for t in tensors_of((args, kwargs or {}))))
        if marks:
            for tensor in tensors_of(result):
                self.marks[tensor] = marks | self._of(tensor)
        return result

    def _of(self, tensor: Tensor) -> frozenset[int]:
        found = self.marks.get(tensor)  # type: ignore[no-untyped-call]
        return frozenset() if found is None else found

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the modules; all hooks are gone on exit."""
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            key = id(module)
            hidden = hidden_of(args, kwargs)
            self.seen.setdefault(key, _Seen()).calls += 1
            self.turn.setdefault(name, len(self.turn))
            self.active.append(key)
            self.shapes[key] = None if hidden is None else hidden.shape
            if hidden is not None:
                self.marks[hidden] = self._of(hidden) | {key}
                self.seen[key].channel_dim = _channel_dim(module, hidden)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        key, seen, hidden = id(module), self.seen[id(module)], first_tensor(output)
        if key in self.active:
            self.active.remove(key)
        seen.same_shape = hidden is not None and hidden.shape == self.shapes[key]
        seen.residual = hidden is not None and key in self._of(hidden)


def _channel_dim(module: nn.Module, hidden: Tensor) -> int:
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) and m.weight.dim() == hidden.dim() for m in module.modules())
    return 1 if convolves and hidden.dim() > 2 else -1


def hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden state among the arguments of a block: the first tensor."""
    for value in (*args, *kwargs.values()):
        found = first_tensor(value)
        if found is not None:
            return found
    return None


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of what a block takes or returns; mappings, tuples, lists and dataclasses are walked."""
    if isinstance(value, Tensor):
        return value
    items: Sequence[Any] = ()
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (tuple, list)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, entry.name) for entry in fields(value)]
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


@contextmanager
def bypassed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let modules hand on their hidden state unchanged, in the form in which they return it.

    What a block returns beside the hidden state (attention maps, biases for others) is computed as ever.
    """
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_as_identity(model.get_submodule(name)))
        yield


@contextmanager
def _as_identity(block: nn.Module) -> Iterator[None]:
    original, own = block.forward, vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(args, kwargs)
        assert hidden is not None
        before = hidden.clone()
        return _replaced(original(*args, **kwargs), before)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _replaced(output: Any, hidden: Tensor) -> Any:
    """`output` with its first tensor replaced."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        key = next(k for k, v in output.items() if first_tensor(v) is not None)
        changed: Any = copy.copy(output)
        changed[key] = _replaced(output[key], hidden)
        return changed
    if is_dataclass(output) and not isinstance(output, type):
        key = next(k for k, v in vars(output).items() if first_tensor(v) is not None)
        result = copy.copy(output)
        object.__setattr__(result, key, _replaced(getattr(output, key), hidden))
        return result
    place = next(i for i, item in enumerate(output) if first_tensor(item) is not None)
    items = [_replaced(item, hidden) if i == place else item for i, item in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
