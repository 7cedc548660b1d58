"""Sums of two tensors of a hidden state's shape, met while a model runs: where a residual connection ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.model.bypass import hidden_of

_SUMS = ("add", "__add__", "__radd__", "add_", "__iadd__")
_WRITES = ("add_", "__iadd__")
_LOOKS = ("__get__", "__set__", "size", "dim", "stride", "data_ptr", "untyped_storage")


class HiddenSums(TorchFunctionMode):
    """Meets the sums of two tensors that hold as many tokens, as wide, as a hidden state of some shape.

    Args:
        shape: of the hidden state; None: no sum is met until there is one.
    """

    def __init__(self, shape: torch.Size | None) -> None:
        super().__init__()
        self.shape = shape

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.shape is None:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        ours = name in _SUMS and len(args) > 1 and all(self._fits(value) for value in args[:2])
        known = self.before(args[:2], writes=name in _WRITES) if ours else None
        found = func(*args, **(kwargs or {}))
        if ours:
            return self.met(known, found)
        if name not in _LOOKS:
            self.made(found)
        return found

    def _fits(self, value: object) -> bool:
        # Some blocks lay all tokens of a batch in one line.
        return (
            isinstance(value, Tensor)
            and self.shape is not None
            and value.dim() > 1
            and value.shape[-1] == self.shape[-1]
            and value.numel() == self.shape.numel()
            and value.is_floating_point()
        )

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> Any:
        """What to know of the operands of a sum, the first of which may be written into."""

    def met(self, known: Any, total: Tensor) -> Tensor:
        """One of the sums; returns what takes its place."""
        return total

    def made(self, found: object) -> None:
        """The result of any other call."""


class SumPlace(NamedTuple):
    """Where a sum is written: what stays the same when other modules are gone.

    Args:
        module: name of the innermost module that ran.
        number: which of its own sums.
    """

    module: str
    number: int


class BlockSums(HiddenSums):
    """Knows which module runs innermost in some blocks, and numbers the sums of each.

    Args:
        model: whose modules are watched while `hooks` holds.
        blocks: names of the blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__(None)
        self.model, self.blocks = model, blocks
        self.block = ""
        self.stack: list[str] = []
        self.counts: dict[str, int] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the blocks and all that is in them, in a with statement around the run."""
        with ExitStack() as stack:
            for name in self.blocks:
                block = self.model.get_submodule(name)
                stack.callback(block.register_forward_pre_hook(self._begin(name), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._end).remove)
                for path, module in block.named_modules(prefix=name):
                    if module is not block:
                        stack.callback(module.register_forward_pre_hook(self._enter(path), with_kwargs=True).remove)
                        stack.callback(module.register_forward_hook(self._leave).remove)
            with self:
                yield

    def place(self) -> SumPlace:
        """Of the sum that is met; call it once for each."""
        name = self.stack[-1]
        self.counts[name] = self.counts.get(name, -1) + 1
        return SumPlace(name, self.counts[name])

    def entered(self, name: str, module: nn.Module, hidden: Tensor | None) -> None:
        """A module within a block is called."""

    def left(self, name: str, output: object) -> None:
        """A module within a block has answered."""

    def began(self, hidden: Tensor) -> None:
        """A block is called."""

    def ended(self) -> None:
        """A block has answered."""

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
            hidden = hidden_of(args, kwargs)
            self.block, self.stack, self.counts = name, [name], {}
            self.shape = None if hidden is None else hidden.shape
            if hidden is not None:
                self.began(hidden)

        return hook

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if self.shape is not None:
            self.ended()
        self.shape, self.stack = None, []

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
            if self.shape is not None:
                self.entered(name, module, hidden_of(args, kwargs))
                self.stack.append(name)

        return hook

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self.shape is not None:
            self.left(self.stack.pop(), output)
