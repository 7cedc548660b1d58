"""Prune a model block by block: the story of a one-shot run.

Every batch goes through a block once, in step with all others: at each weight all wait, the weight is solved from what
they bring, and they go on with its new values. Beside them the original's batches walk with the original's weights,
always one weight ahead, and give the outputs that are to be kept. One block is worked on at a time; between blocks
only hidden states are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.kinds.weights.found import find_weights
from secateur.kinds.weights.granularity import Granularity
from secateur.kinds.weights.weight import Weight
from secateur.model.call import call, device_of, to_device, to_example
from secateur.model.guard import guard
from secateur.registry import one_of
from secateur.request import Request
from secateur.solve.base import Solver
from secateur.solve.blocks.capture import BlockCall, CapturedEntry, enter_stack, returns_tensors
from secateur.solve.blocks.checkpoint import BlockCheckpoint
from secateur.solve.blocks.hidden import HiddenStates
from secateur.solve.blocks.layer import LayerInputs, LayerRecord, solve_layer
from secateur.solve.blocks.products import WHOLE, Site, Use
from secateur.solve.blocks.sites import Matrix, matrices_of, patterns_of
from secateur.solve.blocks.sums import GramSums, add, empty, rows_of
from secateur.solve.blocks.walk import Walk
from secateur.solve.patterns import Pattern
from secateur.structure.stacks import find_stacks
from secateur.types import Batch, Data, Example, LeftOut

Progress = Callable[[int, int], None]
LEAST_BATCHES = 4  # of which one is held out; fewer are all needed to learn from


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run goes about it.

    Args:
        targets: "dense" = the original's outputs under pruned inputs, "own" = the layer's own outputs on them.
        shrinkage: share of the correction towards the original's outputs; None: chosen on held-out tokens.
        hold_out: share of the batches that only choose and guard; 0 leaves the guard out.
        damping: share of the mean diagonal that is added to second moments.
        checkpoint: folder in which finished blocks are kept, and from which a run that was killed goes on.
        memory_bytes: hidden states beyond so much lie on disk; None: all in memory.

    Raises:
        RecipeError: a number or word that means nothing.
    """

    targets: str = "dense"
    shrinkage: float | None = None
    hold_out: float = 0.1
    damping: float = 0.01
    checkpoint: Path | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        one_of("targets", self.targets, ("dense", "own"))
        for name, value in (("shrinkage", self.shrinkage), ("hold_out", self.hold_out)):
            if value is not None and not 0 <= value <= 1:
                raise RecipeError(f"{name}={value!r} is not between 0 and 1")
        if not self.damping >= 0:
            raise RecipeError(f"damping={self.damping!r} is below 0")


@dataclass(frozen=True, eq=False)
class SolvedModel:
    """What a run decided.

    Args:
        masks: parameter name -> bool of its shape, True = keep.
        weights: parameter name -> its new values.
        records: one line per matrix.
        left_out: weights that were not pruned, each with its reason.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    records: Sequence[LayerRecord]
    left_out: Sequence[LeftOut]


def prune_blocks(
    model: nn.Module,
    example: Example,
    data: Data,
    *,
    solver: Solver,
    granularity: Granularity,
    request: Request,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> SolvedModel:
    """Solve every weight inside the blocks of a model; the model is given back as it came.

    Args:
        model: any module; one without a stack of blocks is one block.
        example: what one forward takes, small; it shows where the blocks are.
        data: batches to calibrate with; `attention_mask` marks padding.
        solver: how each layer is solved.
        granularity: element, n:m or block.
        request: target, scope and what is protected.
        settings: how to go about it.
        progress: called as ``progress(done, total)`` with matrices.

    Returns:
        masks, weights, and what is known of every matrix.

    Raises:
        UnsupportedError: nothing can be solved, or a block cannot be run by itself.
        InputError: no data.
        RecipeError, TargetError: an option that solvers do not take.

    Cost:
        One forward pass, two with dense targets; sums of d^2 per input and o d^2 per layer and step. Memory: the hidden
        states, the activations of one block for all batches, a copy of the pruned weights.
    """
    settings = settings or Settings()
    with guard(model, rollback=True), _plainly(model):
        work = _Work(model, example, solver, granularity, request, settings, progress)
        return work.run(data)


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Without caches of keys and values, and with experts one by one: grouped kernels hide what they multiply."""
    with ExitStack() as stack:
        for one in _configs(model):
            if getattr(one, "use_cache", None):
                stack.callback(setattr, one, "use_cache", one.use_cache)
                one.use_cache = False
            before = getattr(one, "_experts_implementation_internal", None)
            if before not in (None, "eager"):
                stack.callback(setattr, one, "_experts_implementation_internal", before)
                one._experts_implementation_internal = "eager"
        was = model.training
        model.eval()
        stack.callback(model.train, was)
        yield


def _configs(model: nn.Module) -> list[Any]:
    """The configs that modules hold, and those inside of them: encoders and decoders may have copies of their own."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if config is None or not hasattr(config, "__dict__"):
            continue
        inner = [value for value in vars(config).values() if type(value).__name__.endswith("Config")]
        found.update({id(one): one for one in (config, *inner)})
    return list(found.values())


@dataclass(eq=False)
class _Stream:
    """The batches on their way: what goes into the next block, pruned and original."""

    hidden: HiddenStates
    dense: HiddenStates | None
    entries: list[CapturedEntry] = field(default_factory=list)

    def close(self) -> None:
        """Let go of hidden states."""
        for store in (self.hidden, self.dense):
            if store is not None:
                store.close()


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
        progress: Progress | None,
    ) -> None:
        self.model, self.example, self.solver, self.settings = model, example, solver, settings
        self.progress, self.dense = progress, settings.targets == "dense" and solver.moves
        self.parameters = dict(model.named_parameters())
        found = find_weights(model, request.protect, example=example)
        self.left: dict[str, LeftOut] = {one.name: one for one in found.left_out}
        self.stacks = self._stacks()
        self.matrices = self._matrices(found.weights, granularity)
        self.patterns: dict[Site, Pattern] = patterns_of(list(self.matrices.values()), granularity, request)
        self.masks: dict[str, Tensor] = {}
        self.records: list[LayerRecord] = []
        self.done: set[Site] = set()
        self.tokens: list[Tensor | None] = []
        self.held: set[int] = set()

    # -- what there is -----------------------------------------------------------------------------------------

    def _stacks(self) -> list[list[str]]:
        """Names of the blocks, stack by stack; one block that is the whole model where there is no stack."""
        found = []
        for stack in find_stacks(self.model, self.example).stacks:
            locked = next((block for block in stack.blocks if block.locks), None)
            if locked is not None:
                raise UnsupportedError(
                    f"{stack.path!r} cannot be pruned block by block: {locked.locks[0].reason} ({locked.name}).",
                    hint="use criterion wanda or magnitude, which need no blocks",
                )
            found.append([block.name for block in stack.blocks])
        return found or [[""]]

    def _matrices(self, weights: Sequence[Weight], granularity: Granularity) -> dict[Site, Matrix]:
        inside = tuple(f"{name}." if name else "" for stack in self.stacks for name in stack)
        found: dict[Site, Matrix] = {}
        for weight in weights:
            if not weight.name.startswith(inside):
                self._leave(weight.name, "it lies outside of the blocks", wanted=False)
                continue
            several = matrices_of(weight, groups=self._groups(weight))
            if not isinstance(several, str) and granularity.name == "n:m" and several[0].kernel > 1:
                m = int(granularity.options()["m"])  # type: ignore[arg-type]
                several = "its channels are no multiple of m" if weight.matrix_shape[1] % m else several
            if isinstance(several, str):
                self._leave(weight.name, several)
            else:
                found.update({matrix.site: matrix for matrix in several})
        if not found:
            raise UnsupportedError(
                "no weight can be solved.",
                why="; ".join(f"{one.name}: {one.why}" for one in list(self.left.values())[:3]),
            )
        return found

    def _groups(self, weight: Weight) -> int:
        return int(getattr(self.model.get_submodule(weight.name.rpartition(".")[0]), "groups", 1))

    def _leave(self, name: str, why: str, *, wanted: bool = True) -> None:
        self.left[name] = LeftOut(name, self.parameters[name].numel(), why, "", wanted)

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, data: Data) -> SolvedModel:
        examples = [self._example(batch) for batch in data]
        if not examples:
            raise InputError("there is no data to calibrate with", hint="give --data, for example text:FILE")
        if len(examples) >= LEAST_BATCHES and self.settings.hold_out:
            self.held = set(range(len(examples) - max(round(len(examples) * self.settings.hold_out), 1), len(examples)))
        before = {name: self.parameters[name].detach().clone() for name in {site[0] for site in self.matrices}}
        try:
            for number, names in enumerate(self.stacks):
                self._stack(number, names, examples)
            return self._outcome(before)
        finally:
            for name, value in before.items():
                self.parameters[name].data.copy_(value)

    def _example(self, batch: Batch) -> Example:
        example = to_device(to_example(batch), device_of(self.model))
        mask = example.get("attention_mask") if isinstance(example, Mapping) else None
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask != 0).all())
        self.tokens.append((mask != 0) if padded and isinstance(mask, Tensor) else None)
        return example

    def _stack(self, number: int, names: Sequence[str], examples: Sequence[Example]) -> None:
        checkpoint = BlockCheckpoint.open(self.settings.checkpoint, self._key(examples), number)
        stream = self._enter(names, examples)
        try:
            self._blocks(names, stream, checkpoint)
        finally:
            stream.close()

    def _blocks(self, names: Sequence[str], stream: _Stream, checkpoint: BlockCheckpoint | None) -> None:
        """All blocks of a stack that are not finished yet."""
        start = 0
        if checkpoint is not None and checkpoint.done:
            start = checkpoint.done
            for place, name in enumerate(names[:start]):
                self._take_back(checkpoint, place, name)
            if start < len(names):
                stream.hidden.fill(checkpoint.hidden("pruned"))
                if stream.dense is not None:
                    stream.dense.fill(checkpoint.hidden("dense"))
        for place in range(start, len(names)):
            records = len(self.records)
            last = place == len(names) - 1
            self._block(names[place], stream, hand_on=not last)
            if checkpoint is not None:
                solved = self._sites(names[place])
                checkpoint.save(
                    place,
                    {name: self.parameters[name].detach() for name in solved if name in self.masks},
                    {name: self.masks[name] for name in solved if name in self.masks},
                    self.records[records:],
                    {} if last else {"pruned": stream.hidden, "dense": stream.dense},
                )

    def _key(self, examples: Sequence[Example]) -> list[object]:
        """What a checkpoint must agree with: weights and data by sums, and what was asked for."""
        sums = [float(p.detach().double().sum()) for p in self.parameters.values()]
        seen = [[float(v.double().sum()) for v in _tensors(one)] for one in examples]
        asked = [self.solver.name, self.solver.options(), self.settings.targets, self.settings.shrinkage]
        return [
            sums,
            seen,
            asked,
            self.settings.hold_out,
            self.settings.damping,
            sorted(map(str, self.patterns.values())),
        ]

    def _take_back(self, checkpoint: BlockCheckpoint, place: int, name: str) -> None:
        weights, masks, records = checkpoint.load(place)
        for key, value in weights.items():
            self.parameters[key].data.copy_(value)
        self.masks.update(masks)
        self.records += records
        self.done |= {site for site in self.matrices if site[0] in masks}
        self._tell()

    def _sites(self, block: str) -> list[str]:
        """Parameters of a block that are solved."""
        before = f"{block}." if block else ""
        return list(dict.fromkeys(site[0] for site in self.matrices if site[0].startswith(before)))

    def _enter(self, names: Sequence[str], examples: Sequence[Example]) -> _Stream:
        if names == [""]:
            calls = [CapturedEntry(None, {"": BlockCall((), {}, "")}) for _ in examples]
            stream = _Stream(HiddenStates(None), HiddenStates(None) if self.dense else None, calls)
            self._whole = examples
            return stream
        plain = returns_tensors(self.model, self.example, names)
        room = self.settings.memory_bytes
        hidden, dense = HiddenStates(room), HiddenStates(room) if self.dense else None
        entries = []
        for example in examples:
            entry = enter_stack(self.model, example, names, plain)
            assert entry.hidden is not None
            hidden.append(entry.hidden)
            if dense is not None:
                dense.append(entry.hidden)
            entries.append(replace(entry, hidden=None))
        return _Stream(hidden, dense, entries)

    def _forward(self, block: str, stream: _Stream, number: int, *, dense: bool) -> Callable[[], object]:
        if block == "":
            return lambda: call(self.model, self._whole[number])
        module, how = self.model.get_submodule(block), stream.entries[number].calls[block]
        store = stream.dense if dense else stream.hidden
        assert store is not None
        # A copy: blocks may write into their input, and both streams begin with the same tensor.
        return lambda: how.run(module, store[number].clone())

    def _block(self, block: str, stream: _Stream, *, hand_on: bool) -> None:
        """Solve one block, and let all batches through it."""
        names = self._sites(block)
        parameters = {name: self.parameters[name] for name in names}
        count = len(stream.entries)
        walks = [Walk(self._forward(block, stream, i, dense=False), parameters, self._is_open) for i in range(count)]
        originals = []
        if self.dense:
            originals = [
                Walk(self._forward(block, stream, i, dense=True), parameters, self._pairs(i)) for i in range(count)
            ]
        try:
            for walk in (*walks, *originals):
                walk.advance()
            shared = None
            while any(walk.stop is not None for walk in walks):
                shared = self._step(walks, originals, shared)
            for original in originals:
                while original.stop is not None:
                    original.advance()
            if hand_on:
                self._hand_on(walks, originals, stream)
        finally:
            for walk in (*walks, *originals):
                walk.cancel()
        for entry in stream.entries:
            entry.calls.pop(block, None)
        self._name_unseen(names)

    def _is_open(self, use: Use) -> bool:
        known = any(site in self.matrices for site in self._of(use))
        return known and not all(site in self.done for site in self._of(use))

    def _of(self, use: Use) -> list[Site]:
        """The matrices of a product: one, or all of a stack that is multiplied at once."""
        name, part = use.site
        if use.stacked:
            return [(name, i) for i in range(len(self.parameters[name]))]
        return [(name, part)]

    def _pairs(self, number: int) -> Callable[[Use], bool]:
        """Where the original stops: once at each weight that all tokens pass, so that tokens stand side by side."""
        met: set[Site] = set()

        def wanted(use: Use) -> bool:
            if use.site in met or use.site not in self.matrices or use.site[1] != WHOLE or use.stacked:
                return False
            met.add(use.site)
            return True

        return wanted

    def _step(self, walks: Sequence[Walk], originals: Sequence[Walk], shared: _Shared | None) -> _Shared | None:
        """Solve the next weight, and let the batches that waited for it go on."""
        # Experts come in order: a batch that skips one must wait for those that do not.
        stops = [walk.stop for walk in walks]
        site = min((use.site for use in stops if use is not None), key=lambda site: site[1])
        here = {i: use for i, use in enumerate(stops) if use is not None and use.site == site}
        first = next(iter(here.values()))
        paired = {i: originals[i].stop for i in here if originals and _stands(originals[i].stop, site)}
        wait = list(paired)
        if any(use is None or use.rows.shape != here[i].rows.shape for i, use in paired.items()):
            paired = {}
        if shared is None or not shared.fits(here):
            shared = self._sum(here, paired if len(paired) == len(here) else {})
        # The original passes with the weights as they came, before they are written.
        for i in wait:
            originals[i].advance()
        for place, part in enumerate(self._of(first)):
            if part in self.matrices:
                self._solve(self.matrices[part], shared.inputs[place if first.stacked else 0], first)
            self.done.add(part)
        self._tell()
        for i in here:
            walks[i].advance()
        return shared

    def _sum(self, here: Mapping[int, Use], paired: Mapping[int, Use | None]) -> _Shared:
        first = next(iter(here.values()))
        parts = len(self.parameters[first.site[0]]) if first.stacked else 1
        return _Shared(dict(here), [self._inputs(here, paired, part) for part in range(parts)])

    def _inputs(self, here: Mapping[int, Use], paired: Mapping[int, Use | None], part: int) -> LayerInputs:
        seen: GramSums | None = None
        held: GramSums | None = None
        dtype = torch.promote_types(next(iter(here.values())).rows.dtype, torch.float32)
        for i, use in here.items():
            rows = rows_of(use, self.tokens[i], dtype, part)
            other = paired.get(i)
            dense = None if other is None else rows_of(other, self.tokens[i], dtype, part)
            if seen is None or held is None:
                seen, held = (empty(rows.shape[1], rows, cross=bool(paired)) for _ in range(2))
            add(held if i in self.held else seen, rows, dense, full=self.solver.needs_gram)
        assert seen is not None
        assert held is not None
        if seen.tokens == 0:
            # An expert that only held-out batches reach is better learned from them than not at all.
            seen, held = held, seen
        return LayerInputs(seen, held, self.settings.damping)

    def _solve(self, matrix: Matrix, inputs: LayerInputs, use: Use) -> None:
        name, part = matrix.site
        parameter = self.parameters[name]
        if use.geometry is None and use.turned != matrix.turned:
            # The product knows better than the class of the module which way round a weight is used.
            matrix = replace(matrix, turned=use.turned, shape=matrix.shape[::-1])
        weight = matrix.read(parameter)
        label = name if part == WHOLE else f"{name}[{part}]"
        solved, record = solve_layer(
            label, weight, inputs, self.patterns[matrix.site], self.solver, self.settings.shrinkage
        )
        if name not in self.masks:
            self.masks[name] = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        matrix.write(solved.weight.to(parameter.dtype), parameter.data)
        matrix.write(solved.mask, self.masks[name])
        self.records.append(record)

    def _hand_on(self, walks: Sequence[Walk], originals: Sequence[Walk], stream: _Stream) -> None:
        for i, walk in enumerate(walks):
            assert isinstance(walk.output, Tensor)
            stream.hidden.put(i, walk.output)
        for i, walk in enumerate(originals):
            assert stream.dense is not None
            assert isinstance(walk.output, Tensor)
            stream.dense.put(i, walk.output)

    def _name_unseen(self, names: Sequence[str]) -> None:
        """What no product with it was seen of stays whole, and is named."""
        for name in names:
            open_ = [site for site in self.matrices if site[0] == name and site not in self.done]
            if not open_:
                continue
            if name in self.masks:
                for site in open_:
                    self._without_tokens(self.matrices[site])
            else:
                self._leave(name, "no product with it was seen while its block ran")
            self.done.update(open_)

    def _without_tokens(self, matrix: Matrix) -> None:
        """An expert that no token reached: its weights alone can say what goes."""
        name, part = matrix.site
        parameter = self.parameters[name]
        weight = matrix.read(parameter)
        mask = self.patterns[matrix.site].keep(weight.abs())
        matrix.write((weight * mask + 0.0).to(parameter.dtype), parameter.data)
        matrix.write(mask, self.masks[name])
        self.records.append(LayerRecord(f"{name}[{part}]", int((~mask).sum()), mask.numel(), 0))

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(len(self.done & set(self.matrices)), len(self.matrices))

    def _outcome(self, before: Mapping[str, Tensor]) -> SolvedModel:
        if not self.masks:
            raise UnsupportedError("no weight was pruned.", hint="; ".join(one.why for one in self.left.values()))
        weights = {name: self.parameters[name].detach().clone() for name in self.masks} if self.solver.moves else {}
        order = list(self.parameters)
        left = sorted(self.left.values(), key=lambda one: order.index(one.name) if one.name in order else -1)
        return SolvedModel(self.masks, weights, self.records, left)


@dataclass(eq=False)
class _Shared:
    """Sums of one input, and the products that read it."""

    here: dict[int, Use]
    inputs: list[LayerInputs]

    def fits(self, here: Mapping[int, Use]) -> bool:
        """Whether other products read the same values."""
        return self.here.keys() == here.keys() and all(self.here[i].same_input(use) for i, use in here.items())


def _stands(use: Use | None, site: Site) -> bool:
    return use is not None and use.site == site


def _tensors(example: Example) -> list[Tensor]:
    if isinstance(example, Tensor):
        return [example]
    values = example.values() if isinstance(example, Mapping) else example or ()
    return [value for value in values if isinstance(value, Tensor)]
