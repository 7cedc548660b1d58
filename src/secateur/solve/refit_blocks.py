"""A refit block by block: where all its layers lie in one stack, nothing before a block is computed again for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from secateur.solve.blocks.capture import handed_on
from secateur.solve.blocks.plainly import plainly
from secateur.solve.blocks.stream import BatchStream
from secateur.solve.refit_layers import RefitRule, layers_of
from secateur.solve.refit_seen import RefitBatch
from secateur.solve.refit_solve import RefitBatches, fit_layers
from secateur.structure.capture import capture
from secateur.structure.stacks import find_stacks
from secateur.types import Example

ROOM = 1 << 30  # bytes of hidden states in memory, for both models together; the rest lies on disk
WORTH = 3  # layers from which entering the stack costs less than it saves


@dataclass(eq=False)
class BlocksAlone:
    """Blocks that are run by themselves, in the original and in the cut model.

    Args:
        models: both.
        example: a batch of few samples.
        names: the blocks up to the last with a layer to fit, in the order in which they run.
        weights: of the layers to fit.
        batches: gives all batches anew.
    """

    models: tuple[nn.Module, nn.Module]
    example: Example
    names: Sequence[str]
    weights: Sequence[str]
    batches: RefitBatches

    def fit(self, rule: RefitRule, tell: Callable[[], None]) -> dict[str, Tensor]:
        """Fit the layers of each block on what the blocks before it hand on, in both models; see `fit_layers`."""
        changed: dict[str, Tensor] = {}
        with ExitStack() as stack:
            whole = list(self.batches())
            streams, real = self._enter(whole, stack), [batch.real for batch in whole]
            for name in self.names:
                inside = [f"block.{w.removeprefix(name + '.')}" for w in self.weights if w.startswith(f"{name}.")]
                alone = _Alone(streams[0], name), _Alone(streams[1], name)
                if inside:
                    fitted = self._fit_block(alone, streams, real, inside, rule.within(f"{name}.", "block."), tell)
                    changed.update({f"{name}.{key.removeprefix('block.')}": value for key, value in fitted.items()})
                if name != self.names[-1]:
                    for stream, block in zip(streams, alone, strict=True):
                        _advance(stream, name, block)
        return changed

    @staticmethod
    def _fit_block(
        alone: tuple[_Alone, _Alone],
        streams: tuple[BatchStream, BatchStream],
        real: Sequence[Tensor | None],
        weights: Sequence[str],
        rule: RefitRule,
        tell: Callable[[], None],
    ) -> dict[str, Tensor]:
        def batches() -> Iterator[RefitBatch]:
            for number, tokens in enumerate(real):
                original, cut = ((stream.before(number, dense=False), number) for stream in streams)
                yield RefitBatch(original, cut, tokens)

        first = next(batches())
        traces = capture(alone[0], first.original), capture(alone[1], first.cut)
        return fit_layers(alone, traces, layers_of(alone[1], traces, rule, weights)[0], batches, rule, tell)

    def same(self) -> bool:
        """Whether batches that go through the blocks one by one end as in the whole model, in both.

        Two batches, since blocks that tell each other something beside the hidden state would mix them up.
        """
        first = list(islice(self.batches(), 2))
        examples = [batch.original for batch in first], [batch.cut for batch in first]
        with ExitStack() as stack:
            for stream, model, own in zip(self._enter(first, stack), self.models, examples, strict=True):
                for name in self.names:
                    _advance(stream, name, _Alone(stream, name))
                for number, example in enumerate(own):
                    goal, found = handed_on(model, self.names[-1], example), stream.hidden[number]
                    close = 1e3 * torch.finfo(goal.dtype).eps * float(goal.abs().max())
                    if goal.shape != found.shape or not float((goal - found).abs().max()) <= close:
                        return False
        return True

    def _enter(self, batches: Sequence[RefitBatch], stack: ExitStack) -> tuple[BatchStream, BatchStream]:
        """Both models' batches in front of the first block."""
        found = []
        examples = [batch.original for batch in batches], [batch.cut for batch in batches]
        for model, own in zip(self.models, examples, strict=True):
            # The names of all blocks: entering ends at the last of them.
            stack.enter_context(plainly(model))
            stream = BatchStream.enter(model, self.example, list(self.names), own, dense=False, room=ROOM // 2)
            stack.callback(stream.close)
            found.append(stream)
        return found[0], found[1]


def blocks_alone(
    models: tuple[nn.Module, nn.Module], example: Example, weights: Sequence[str], batches: RefitBatches
) -> BlocksAlone | None:
    """The blocks that hold all layers of a refit, if there are such that can be run by themselves.

    Args:
        models: the original and the cut model.
        example: a batch of few samples.
        weights: of the layers to fit.
        batches: gives all batches anew.
    """
    if len(weights) < WORTH:
        return None
    for stack in find_stacks(models[0], example).stacks:
        names = [block.name for block in stack.blocks]
        held = [i for i, name in enumerate(names) if any(w.startswith(f"{name}.") for w in weights)]
        inside = sum(w.startswith(tuple(f"{name}." for name in names)) for w in weights)
        if inside < len(weights) or any(block.locks for block in stack.blocks) or len(held) < 2:
            continue
        alone = BlocksAlone(models, example, names[: held[-1] + 1], weights, batches)
        return alone if alone.same() else None
    return None


class _Alone(nn.Module):
    """A block as a model: what goes into it for a batch, and the number of the batch -> what it hands on."""

    def __init__(self, stream: BatchStream, name: str) -> None:
        super().__init__()
        self.block = stream.model.get_submodule(name)
        self._calls = [entry.calls[name] for entry in stream.entries]

    def forward(self, hidden: Tensor, number: int) -> Tensor:
        return self._calls[number].run(self.block, hidden)


def _advance(stream: BatchStream, name: str, alone: _Alone) -> None:
    """All batches through a block."""
    with torch.no_grad():
        for number in range(len(stream.entries)):
            stream.hidden.put(number, alone(stream.before(number, dense=False), number))
    stream.leave(name)
