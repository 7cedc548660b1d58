"""One block: all batches walk through it in step, and each weight is solved from what they bring to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.solve.base import Solver
from secateur.solve.blocks.inventory import Inventory
from secateur.solve.blocks.layer import LayerInputs, LayerRecord, solve_layer
from secateur.solve.blocks.products import WHOLE, MatrixSite, Use
from secateur.solve.blocks.settings import Settings
from secateur.solve.blocks.sites import Matrix
from secateur.solve.blocks.stream import BatchStream
from secateur.solve.blocks.sums import GramSums, add, empty, rows_of
from secateur.solve.blocks.together import summed
from secateur.solve.blocks.tune import BlockGoal, SubBlockRecord, goal_of, tune_block
from secateur.solve.blocks.walk import Walk
from secateur.solve.patterns import Pattern


class BlockSolver:
    """Solves block after block of a model, in place.

    Args:
        inventory: what there is to solve.
        solver: how.
        settings: how to go about it.
        patterns: of every matrix.
        tokens: batch by batch, True = no padding; None = there is none.
        held: numbers of the batches that only choose and guard.
        tell: called after every weight.

    Attributes:
        masks: of what is solved, by parameter.
        records: one per matrix.
        tuned: one per sub-block that was trained.
        done: sites that are finished.
    """

    def __init__(
        self,
        inventory: Inventory,
        solver: Solver,
        settings: Settings,
        patterns: Mapping[MatrixSite, Pattern],
        tokens: Sequence[Tensor | None],
        held: Collection[int],
        tell: Callable[[int, int], None],
    ) -> None:
        self.inventory, self.solver, self.settings, self.patterns = inventory, solver, settings, patterns
        self.matrices, self.parameters = inventory.matrices, inventory.parameters
        self.tokens, self.held, self._progress = tokens, held, tell
        self.masks: dict[str, Tensor] = {}
        self.records: list[LayerRecord] = []
        self.tuned: list[SubBlockRecord] = []
        self.done: set[MatrixSite] = set()

    def tell(self) -> None:
        """Say how far it is."""
        self._progress(len(self.done & set(self.matrices)), len(self.matrices))

    def solve(self, block: str, stream: BatchStream, *, hand_on: bool) -> None:
        """Solve one block, and let all batches through it."""
        names = self.inventory.solved_in(block)
        parameters = {name: self.parameters[name] for name in names}
        goal = self._goal(block, stream, names)
        count = len(stream.entries)
        walks = [Walk(stream.forward(block, i, dense=False), parameters, self._is_open) for i in range(count)]
        originals = []
        if stream.dense is not None:
            originals = [Walk(stream.forward(block, i, dense=True), parameters, self._pairs()) for i in range(count)]
        try:
            for walk in (*walks, *originals):
                walk.advance()
            shared = None
            while any(walk.stop is not None for walk in walks):
                shared = self._step(walks, originals, shared)
            for original in originals:
                while original.stop is not None:
                    original.advance()
            if goal is not None:
                self._tune(block, stream, goal)
            if hand_on:
                self._hand_on(block, walks, originals, stream, anew=goal is not None)
        finally:
            for walk in (*walks, *originals):
                walk.cancel()
        stream.leave(block)
        self._name_unseen(names)

    # -- sub-blocks --------------------------------------------------------------------------------------------

    def _goal(self, block: str, stream: BatchStream, names: Sequence[str]) -> BlockGoal | None:
        """What the original makes of the batches, before its weights are written; None where nothing is trained."""
        how = self.settings.reconstruct
        if how is None or block == "" or not names:
            return None
        calls = [entry.calls[block] for entry in stream.entries]
        dense = stream.dense is not None
        return goal_of(
            self.inventory.model.get_submodule(block),
            calls,
            lambda i: stream.before(i, dense=dense),
            {name: self.parameters[name] for name in names},
            how,
        )

    def _tune(self, block: str, stream: BatchStream, goal: BlockGoal) -> None:
        how = self.settings.reconstruct
        assert how is not None
        self.tuned += tune_block(
            block,
            self.inventory.model.get_submodule(block),
            [entry.calls[block] for entry in stream.entries],
            lambda i: stream.before(i, dense=False),
            goal,
            self.masks,
            self.tokens,
            sorted(self.held),
            how,
        )

    @staticmethod
    def _hand_on(
        block: str, walks: Sequence[Walk], originals: Sequence[Walk], stream: BatchStream, *, anew: bool
    ) -> None:
        """Put what the block makes of the batches in the place of what went into it."""
        for i, walk in enumerate(walks):
            # The walks ended before the block was trained.
            with torch.no_grad():
                output = stream.forward(block, i, dense=False)() if anew else walk.output
            assert isinstance(output, Tensor)
            stream.hidden.put(i, output)
        for i, walk in enumerate(originals):
            assert stream.dense is not None
            assert isinstance(walk.output, Tensor)
            stream.dense.put(i, walk.output)

    # -- weights -----------------------------------------------------------------------------------------------

    def _is_open(self, use: Use) -> bool:
        known = any(site in self.matrices for site in self._of(use))
        return known and not all(site in self.done for site in self._of(use))

    def _of(self, use: Use) -> list[MatrixSite]:
        """The matrices of a product: one, or all of a stack that is multiplied at once."""
        name, part = use.site
        if use.stacked:
            return [(name, i) for i in range(len(self.parameters[name]))]
        return [(name, part)]

    def _pairs(self) -> Callable[[Use], bool]:
        """Where the original stops: once at each weight that all tokens pass, so that tokens stand side by side."""
        met: set[MatrixSite] = set()

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
        if not self.solver.moves or any(
            use is None or use.rows.shape != here[i].rows.shape for i, use in paired.items()
        ):
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
        self.tell()
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
        seen, held = (summed(one, together=self.settings.together) for one in (seen, held))
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
                self.inventory.leave(name, "no product with it was seen while its block ran")
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


@dataclass(eq=False)
class _Shared:
    """Sums of one input, and the products that read it."""

    here: dict[int, Use]
    inputs: list[LayerInputs]

    def fits(self, here: Mapping[int, Use]) -> bool:
        """Whether other products read the same values."""
        return self.here.keys() == here.keys() and all(self.here[i].same_input(use) for i, use in here.items())


def _stands(use: Use | None, site: MatrixSite) -> bool:
    return use is not None and use.site == site
