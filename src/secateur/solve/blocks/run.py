"""Prune a model block by block: the story of a one-shot run.

Every batch goes through a block once, in step with all others: at each weight all wait, the weight is solved from what
they bring, and they go on with its new values. Beside them the original's batches walk with the original's weights,
always one weight ahead, and give the outputs that are to be kept. One block is worked on at a time; between blocks
only hidden states are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.kinds.weights.granularity import Granularity
from secateur.model.call import device_of, to_device, to_example
from secateur.model.guard import guard
from secateur.model.padding import real_tokens
from secateur.request import Request
from secateur.solve.base import Solver
from secateur.solve.blocks.allocation import block_shares, site_shares
from secateur.solve.blocks.checkpoint import BlockCheckpoint
from secateur.solve.blocks.distance import distance
from secateur.solve.blocks.inventory import Inventory
from secateur.solve.blocks.layer import LayerRecord
from secateur.solve.blocks.plainly import plainly
from secateur.solve.blocks.products import MatrixSite
from secateur.solve.blocks.settings import LEAST_BATCHES, Settings
from secateur.solve.blocks.sites import patterns_of, share_of
from secateur.solve.blocks.step import BlockSolver
from secateur.solve.blocks.stream import BatchStream
from secateur.solve.blocks.together import mine
from secateur.solve.blocks.tune import SubBlockRecord
from secateur.solve.patterns import Pattern
from secateur.types import Advance, Batch, Data, Example, LeftOut

__all__ = ["Settings", "SolvedModel", "prune_blocks"]


@dataclass(frozen=True)
class SharesOutcome:
    """How unequal shares fared against equal ones.

    Args:
        name: of the rule.
        shares: block -> share that it gives up by that rule.
        equal, unequal: distance of the outputs on held-out batches to the original's; None where nobody compared.
        taken: the unequal shares were taken.
    """

    name: str
    shares: Mapping[str, float]
    equal: float | None
    unequal: float | None
    taken: bool


@dataclass(frozen=True, eq=False)
class SolvedModel:
    """What a run decided.

    Args:
        masks: parameter name -> bool of its shape, True = keep.
        weights: parameter name -> its new values.
        records: one line per matrix.
        left_out: weights that were not pruned, each with its reason.
        tuned: one line per sub-block that was trained.
        choice: of the shares of blocks, where they may differ.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    records: Sequence[LayerRecord]
    left_out: Sequence[LeftOut]
    tuned: Sequence[SubBlockRecord] = ()
    choice: SharesOutcome | None = None


def prune_blocks(
    model: nn.Module,
    example: Example,
    data: Data,
    *,
    solver: Solver,
    granularity: Granularity,
    request: Request,
    settings: Settings | None = None,
    progress: Advance | None = None,
    in_place: bool = False,
    release: Callable[[], None] | None = None,
) -> SolvedModel:
    """Solve every weight inside the blocks of a model; the model is given back as it came.

    Args:
        model: any module, on any device, where all is computed; one without a stack of blocks is one block.
        example: what one forward takes, small; it shows where the blocks are.
        data: batches to calibrate with; `attention_mask` marks padding.
        solver: how each layer is solved.
        granularity: element, n:m or block.
        request: target, scope and what is protected.
        settings: how to go about it.
        progress: called as ``progress(done, total)`` with matrices.
        in_place: the model keeps what is found, and nothing else does: for weights that lie on disk, of which there
            is no room for a copy. Masks and weights of the answer are then empty.
        release: called behind every weight and block, to let what is not needed go out of memory.

    Returns:
        masks, weights, and what is known of every matrix.

    Raises:
        UnsupportedError: nothing can be solved, or a block cannot be run by itself.
        InputError: no data.
        RecipeError, TargetError: an option that solvers do not take.

    Cost:
        One forward pass, two with dense targets; sums of d^2 per input and o d^2 per layer and step. Memory: the hidden
        states, the activations of one block for all batches, a copy of the pruned weights. Reconstruction: two forward
        passes more, and per epoch one forward and backward pass through each sub-block and what stands before it in
        its block.
    """
    settings = settings or Settings()
    with guard(model, rollback=not in_place), plainly(model):
        work = _Work(model, example, solver, granularity, request, settings, progress)
        work.in_place, work.release = in_place, release
        return work.run(data)


class _Work:
    """A run that is under way."""

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        solver: Solver,
        granularity: Granularity,
        request: Request,
        settings: Settings,
        progress: Advance | None,
    ) -> None:
        self.model, self.solver, self.settings = model, solver, settings
        self.example = to_device(example, device_of(model))
        self.granularity, self.request, self.progress = granularity, request, progress
        self.dense = settings.dense(request.target)
        self.inventory = Inventory(model, self.example, granularity, request)
        self.parameters = self.inventory.parameters
        self.examples: list[Example] = []
        self.tokens: list[Tensor | None] = []
        self.held: set[int] = set()
        self.passes, self.passed = 1, 0
        self.in_place = False
        self.release: Callable[[], None] | None = None

    def run(self, data: Data) -> SolvedModel:
        """All of it."""
        self.examples = [self._example(batch) for batch in data]
        if not self.examples:
            raise InputError("there is no data to calibrate with", hint="give --data, for example text:FILE")
        count = len(self.examples)
        if count >= LEAST_BATCHES and self.settings.hold_out:
            self.held = set(range(count - max(round(count * self.settings.hold_out), 1), count))
        own = mine(count, self.settings, self.inventory.matrices)
        self.examples, self.tokens = [self.examples[i] for i in own], [self.tokens[i] for i in own]
        self.held = {place for place, number in enumerate(own) if number in self.held}
        if self.settings.allocation is None:
            return self._solved(self._patterns(None), self.settings)
        return self._allocated(share_of(self.granularity, self.request))

    def _example(self, batch: Batch) -> Example:
        example = to_device(to_example(batch), device_of(self.model))
        self.tokens.append(real_tokens(example))
        return example

    def _patterns(self, shares: Mapping[MatrixSite, float] | None) -> dict[MatrixSite, Pattern]:
        return patterns_of(list(self.inventory.matrices.values()), self.granularity, self.request, shares)

    # -- shares of blocks --------------------------------------------------------------------------------------

    def _allocated(self, share: float) -> SolvedModel:
        """With unequal shares, unless equal ones leave the outputs nearer to the original's."""
        how = self.settings.allocation
        assert how is not None
        if self.in_place:
            raise RecipeError(
                "blocks.allocation compares two pruned models, and of weights on disk there is one.",
                hint="leave it out, or prune in memory",
            )
        learn = [i for i in range(len(self.examples)) if i not in self.held]
        shares = block_shares(
            self.inventory, [self.examples[i] for i in learn], [self.tokens[i] for i in learn], share, how
        )
        unequal = self._patterns(site_shares(self.inventory, shares, share))
        if not how.check or not self.held:
            return replace(
                self._solved(unequal, self.settings, "unequal"),
                choice=SharesOutcome(how.name, shares, None, None, True),
            )
        self.passes = 2 if self.settings.reconstruct is None else 3
        # Both are compared as solvers leave them: training would take its time for both, and follows for one.
        quick = replace(self.settings, reconstruct=None)
        found = [
            self._solved(patterns, quick, f"{place}-compared")
            for place, patterns in (("equal", self._patterns(None)), ("unequal", unequal))
        ]
        held = [self.examples[i] for i in sorted(self.held)]
        apart = [distance(self.model, held, one.masks, one.weights) for one in found]
        taken = apart[1] < apart[0]
        choice = SharesOutcome(how.name, shares, apart[0], apart[1], taken)
        if self.settings.reconstruct is None:
            return replace(found[taken], choice=choice)
        del found
        return replace(self._solved(unequal if taken else self._patterns(None), self.settings, "chosen"), choice=choice)

    # -- one pass ----------------------------------------------------------------------------------------------

    def _solved(self, patterns: Mapping[MatrixSite, Pattern], settings: Settings, room: str = "") -> SolvedModel:
        """All stacks with given patterns; the weights of the model are put back."""
        names = {site[0] for site in self.inventory.matrices}
        before = {} if self.in_place else {name: self.parameters[name].detach().clone() for name in names}
        work = BlockSolver(self.inventory, self.solver, settings, patterns, self.tokens, self.held, self._tell)
        key = None if settings.checkpoint is None else self._key(patterns, settings)
        try:
            for number, blocks in enumerate(self.inventory.stacks):
                folder = None if settings.checkpoint is None else settings.checkpoint / room
                self._stack(work, blocks, BlockCheckpoint.open(folder, key, number))
            self.passed += 1
            return self._outcome(work, trained=settings.reconstruct is not None)
        finally:
            for name, value in before.items():
                self.parameters[name].data.copy_(value)

    def _tell(self, done: int, total: int) -> None:
        if self.release is not None:
            # Behind every weight, and not only behind a block: solvers need more for a moment than a block does.
            self.release()
        if self.progress is not None:
            self.progress(self.passed * total + done, self.passes * total)

    def _stack(self, work: BlockSolver, names: Sequence[str], checkpoint: BlockCheckpoint | None) -> None:
        """All blocks of a stack that are not finished yet."""
        wanted = self.dense and (self.solver.moves or work.settings.reconstruct is not None)
        room = work.settings.memory_bytes
        stream = BatchStream.enter(self.model, self.example, names, self.examples, dense=wanted, room=room)
        try:
            start = 0 if checkpoint is None else self._take_back(work, names, stream, checkpoint)
            for place in range(start, len(names)):
                records, tuned = len(work.records), len(work.tuned)
                last = place == len(names) - 1
                work.solve(names[place], stream, hand_on=not last)
                if checkpoint is not None:
                    solved = [name for name in self.inventory.solved_in(names[place]) if name in work.masks]
                    checkpoint.save(
                        place,
                        {name: self.parameters[name].detach() for name in solved},
                        {name: work.masks[name] for name in solved},
                        work.records[records:],
                        work.tuned[tuned:],
                        {} if last else {"pruned": stream.hidden, "dense": stream.dense},
                    )
                self._let_go(work)
        finally:
            stream.close()

    def _take_back(
        self, work: BlockSolver, names: Sequence[str], stream: BatchStream, checkpoint: BlockCheckpoint
    ) -> int:
        """What is finished; how many blocks of the stack that is."""
        for place in range(checkpoint.done):
            weights, masks, records, tuned = checkpoint.load(place)
            for key, value in weights.items():
                self.parameters[key].data.copy_(value)
            work.masks.update(masks)
            work.records += records
            work.tuned += tuned
            work.done |= {site for site in self.inventory.matrices if site[0] in masks}
            work.tell()
            self._let_go(work)
        if 0 < checkpoint.done < len(names):
            stream.hidden.fill(checkpoint.hidden("pruned"))
            if stream.dense is not None:
                stream.dense.fill(checkpoint.hidden("dense"))
        return checkpoint.done

    def _let_go(self, work: BlockSolver) -> None:
        """Behind a block: what its weights do not hold themselves is of no more use where they stay."""
        if self.in_place:
            work.masks.clear()
        if self.release is not None:
            self.release()

    def _key(self, patterns: Mapping[MatrixSite, Pattern], settings: Settings) -> list[object]:
        """What a checkpoint must agree with: weights and data by sums, and what was asked for."""
        return [
            # Summed in double precision, and not cast to it: a copy of the largest weight may not fit.
            [float(p.detach().sum(dtype=torch.float64)) for p in self.parameters.values()],
            [[float(v.double().sum()) for v in _tensors(one)] for one in self.examples],
            [self.solver.name, self.solver.options(), self.dense, settings.shrinkage],
            settings.hold_out,
            settings.damping,
            settings.reconstruct,
            sorted(f"{site} {pattern}" for site, pattern in patterns.items()),
        ]

    def _outcome(self, work: BlockSolver, *, trained: bool) -> SolvedModel:
        left = self.inventory.left
        if not work.records:
            raise UnsupportedError("no weight was pruned.", hint="; ".join(one.why for one in left.values()))
        moved = work.masks if self.solver.moves or trained else ()
        weights = {name: self.parameters[name].detach().clone() for name in moved}
        order = list(self.parameters)
        told = sorted(left.values(), key=lambda one: order.index(one.name) if one.name in order else -1)
        return SolvedModel(work.masks, weights, work.records, told, work.tuned)


def _tensors(example: Example) -> list[Tensor]:
    if isinstance(example, Tensor):
        return [example]
    values = example.values() if isinstance(example, Mapping) else example or ()
    return [value for value in values if isinstance(value, Tensor)]
