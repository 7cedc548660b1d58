"""The batches on their way from block to block: what goes into the next one, pruned and original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from secateur.model.call import call
from secateur.solve.blocks.capture import BlockCall, CapturedEntry, enter_stack, returns_tensors
from secateur.solve.blocks.hidden import HiddenStates
from secateur.types import Example


@dataclass(eq=False)
class BatchStream:
    """All batches in front of a block.

    Args:
        model: whose blocks they go through.
        hidden: what the pruned blocks before hand on.
        dense: what those of the original hand on; None where nobody asks.
        entries: how the blocks are called, batch by batch.
        whole: the batches themselves, where the only block is the whole model.
    """

    model: nn.Module
    hidden: HiddenStates
    dense: HiddenStates | None
    entries: list[CapturedEntry] = field(default_factory=list)
    whole: Sequence[Example] = ()

    @classmethod
    def enter(
        cls,
        model: nn.Module,
        example: Example,
        names: Sequence[str],
        batches: Sequence[Example],
        *,
        dense: bool,
        room: int | None,
    ) -> BatchStream:
        """All batches in front of the first block of a stack."""
        if names == [""]:
            calls = [CapturedEntry(None, {"": BlockCall((), {}, "")}) for _ in batches]
            return cls(model, HiddenStates(None), HiddenStates(None) if dense else None, calls, batches)
        plain = returns_tensors(model, example, names)
        stream = cls(model, HiddenStates(room), HiddenStates(room) if dense else None)
        for batch in batches:
            entry = enter_stack(model, batch, names, plain)
            assert entry.hidden is not None
            for store in stream.stores():
                store.append(entry.hidden)
            stream.entries.append(replace(entry, hidden=None))
        return stream

    def stores(self) -> list[HiddenStates]:
        """Those that there are."""
        return [store for store in (self.hidden, self.dense) if store is not None]

    def forward(self, block: str, number: int, *, dense: bool) -> Callable[[], object]:
        """One batch through one block."""
        if block == "":
            return lambda: call(self.model, self.whole[number])
        module, how = self.model.get_submodule(block), self.entries[number].calls[block]
        # A copy: blocks may write into their input, and both streams begin with the same tensor.
        return lambda: how.run(module, self.before(number, dense=dense))

    def before(self, number: int, *, dense: bool) -> Tensor:
        """A copy of what goes into the next block."""
        store = self.dense if dense else self.hidden
        assert store is not None
        return store[number].clone()

    def leave(self, block: str) -> None:
        """Forget how a block was called."""
        for entry in self.entries:
            entry.calls.pop(block, None)

    def close(self) -> None:
        """Let go of hidden states."""
        for store in self.stores():
            store.close()
