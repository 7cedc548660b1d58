"""What is seen of blocks while a model runs: how often, in which order, and whether a residual path passes them by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from secateur.model.bypass import first_tensor, hidden_of
from secateur.structure.trace import Args, Kwargs, Op, tensors_of
from secateur.structure.turns import Site, sites

# What ends a residual path: after a product or a lookup, a tensor no longer is the block's input plus something.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "dot", "einsum", "grouped_mm")
MIXING = (*PRODUCTS, "convolution", "conv", "scaled_dot_product", "embedding", "lstm", "gru", "rnn")


@dataclass
class BlockRun:
    """What was seen of one module.

    Args:
        calls: how often it ran.
        same_shape: its first tensor result has the shape of its first tensor argument.
        residual: its input reaches its output on a path without any product.
        mixes: it holds a product or convolution.
        channel_dim: dimension of the hidden state that holds the features.
    """

    calls: int = 0
    same_shape: bool = False
    residual: bool = False
    mixes: bool = False
    channel_dim: int = -1


@dataclass(eq=False)
class BlockRuns(TorchDispatchMode):
    """Follows which block's input reaches a tensor without a product or convolution in between.

    Args:
        modules: the blocks to watch, by a name of the caller's.
        seen: id of a module -> what was seen of it.
        turn: name -> place in the order in which the blocks first ran.
        called: name -> where a block was first called from.
    """

    modules: Mapping[str, nn.Module]
    seen: dict[int, BlockRun] = field(default_factory=dict)
    turn: dict[str, int] = field(default_factory=dict)
    called: dict[str, list[Site]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Tensor -> ids of the blocks whose input it continues. Weak, so that watching keeps no activation alive.
        self.marks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.active: list[int] = []  # ids of the blocks that run now, the innermost last
        self.shapes: dict[int, torch.Size | None] = {}  # of the hidden state that each block was given

    def __torch_dispatch__(self, func: Op, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.lstrip("_")
        if any(name == word or name.startswith((f"{word}_", f"{word}.")) for word in MIXING):
            for key in self.active:
                self.seen[key].mixes = True
            return result
        marks = frozenset().union(*(self._of(t) for t in tensors_of((args, kwargs or {}))))
        if marks:
            for tensor in tensors_of(result):
                # An in-place addition returns a tensor that has marks already: both paths reach it.
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

    def _enter(self, name: str) -> Callable[[nn.Module, Sequence[object], Mapping[str, object]], None]:
        def enter(module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
            key = id(module)
            hidden = hidden_of(args, kwargs)
            self.seen.setdefault(key, BlockRun()).calls += 1
            self.turn.setdefault(name, len(self.turn))
            if name not in self.called:
                self.called[name] = sites()
            self.active.append(key)
            self.shapes[key] = None if hidden is None else hidden.shape
            if hidden is not None:
                self.marks[hidden] = self._of(hidden) | {key}
                self.seen[key].channel_dim = _channel_dim(module, hidden)

        return enter

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        key, seen, hidden = id(module), self.seen[id(module)], first_tensor(output)
        if key in self.active:
            self.active.remove(key)
        seen.same_shape = hidden is not None and hidden.shape == self.shapes[key]
        seen.residual = hidden is not None and key in self._of(hidden)


def _channel_dim(module: nn.Module, hidden: Tensor) -> int:
    """1 in a convolutional block, whose hidden state is [n, c, ...]; else the last dimension."""
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) and m.weight.dim() == hidden.dim() for m in module.modules())
    return 1 if convolves and hidden.dim() > 2 else -1
