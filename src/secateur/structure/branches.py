"""Residual branches of blocks, found by execution: attention and MLP of a transformer layer, each by itself.

No module is known by name. A branch ends in a sum of two tensors of the hidden state's shape of which one, the trunk,
was there before the first weight of the branch was multiplied. Its modules are those that run between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.model.bypass import first_tensor
from secateur.model.call import call
from secateur.structure.capture import quiet
from secateur.structure.sums import BlockSums, SumPlace
from secateur.types import Example


@dataclass(frozen=True)
class Answering:
    """How a module answers.

    Args:
        name: of the module.
        items: 0 = a tensor; else a tuple of so many items, the first a tensor.
    """

    name: str
    items: int


@dataclass(frozen=True)
class ResidualBranch:
    """What a block computes and adds to its hidden state.

    Args:
        block: name of the block.
        place: of the sum that ends it.
        side: which operand of the sum it is, 0 or 1.
        modules: that run for it alone, in this order; those within another one are not listed.
        why: why these cannot be taken out; "" if they can.
    """

    block: str
    place: SumPlace
    side: int
    modules: tuple[Answering, ...]
    why: str = ""


@dataclass
class _Run:
    """What a module did within a block."""

    name: str
    parent: str
    enter: int
    weighs: bool  # whether it holds parameters
    leave: int = -1
    items: int = -1  # -1: neither a tensor nor a tuple that begins with one
    given: Tensor | None = None
    hidden_in: bool = False
    hidden_out: bool = False
    hands_on: bool = False  # whether it answers with what it was given: an identity on either path, a dropout


@dataclass
class _Ended:
    """A sum that ends a branch, and when its trunk came to be."""

    place: SumPlace
    side: int
    since: int
    until: int


class _Finder(BlockSums):
    """Tells which sums end a branch, and which modules ran for it."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__(model, blocks)
        self.found: dict[str, list[ResidualBranch]] = {}
        self.often: set[str] = set()  # blocks that run more than once
        self.began(torch.empty(0))

    def began(self, hidden: Tensor) -> None:
        self.clock, self.products, self.start = 0, 0, 0
        self.runs: list[_Run] = []
        self.sums: list[_Ended] = []
        self.made_at: dict[int, tuple[int, int]] = {}  # storage -> products and clock when it came to be
        self.alive: list[Tensor] = []  # addresses of what is alive are not given out again
        self.made(hidden)

    def entered(self, name: str, module: nn.Module, hidden: Tensor | None) -> None:
        self.clock += 1
        # Norms and scales have vectors; what multiplies has a matrix at least.
        self.products += any(p.dim() > 1 for p in module._parameters.values() if p is not None)
        weighs = next(module.parameters(), None) is not None
        self.runs.append(_Run(name, self.stack[-1], self.clock, weighs, given=hidden, hidden_in=self._fits(hidden)))

    def left(self, name: str, output: object) -> None:
        self.clock += 1
        run = next(run for run in reversed(self.runs) if run.name == name)
        found = first_tensor(output)
        run.leave, run.items, run.hidden_out = self.clock, _items(output), self._fits(found)
        run.hands_on = found is not None and run.given is not None and found.data_ptr() == run.given.data_ptr()

    def made(self, found: object) -> None:
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
                self.alive.append(value)
                self.made_at.setdefault(value.untyped_storage().data_ptr(), (self.products, self.clock))

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> list[tuple[int, int]]:
        now = (self.products, self.clock)
        return [self.made_at.get(one.untyped_storage().data_ptr(), now) for one in operands]

    def met(self, known: list[tuple[int, int]], total: Tensor) -> Tensor:
        place = self.place()
        side = int(known[1][0] > known[0][0])
        trunk, branch = known[1 - side], known[side]
        # Branches side by side are summed first: none of the two operands is older than their products.
        if trunk[0] <= self.start < branch[0]:
            self.sums.append(_Ended(place, side, trunk[1], self.clock))
            self.start = self.products
        self.alive.append(total)
        self.made_at[total.untyped_storage().data_ptr()] = (self.products, self.clock)
        return total

    def ended(self) -> None:
        if self.block in self.found:
            self.often.add(self.block)
        self.found[self.block] = [self._branch(one) for one in self.sums]
        self.began(torch.empty(0))

    def _branch(self, found: _Ended) -> ResidualBranch:
        inside = [run for run in self.runs if found.since < run.enter and -1 < run.leave <= found.until]
        names = {run.name for run in inside}
        names_run = [run.name for run in self.runs]
        # Without weights and in several places, or doing nothing: a dropout of the block, an identity in its trunk.
        own = [
            run
            for run in inside
            if run.parent not in names and (run.weighs or (names_run.count(run.name) == 1 and not run.hands_on))
        ]
        modules = tuple(Answering(run.name, run.items) for run in own)
        return ResidualBranch(self.block, found.place, found.side, modules, self._fault(own))

    def _fault(self, top: Sequence[_Run]) -> str:
        if not top:
            return "no module runs for it alone"
        names = [run.name for run in self.runs]
        for run in top:
            if names.count(run.name) > 1:
                return f"{run.name} runs several times in the block"
            if run.items < 0:
                return f"{run.name} answers with neither a tensor nor a tuple that begins with one"
        if not top[0].hidden_in:
            return f"{top[0].name} is not given the hidden state"
        return "" if top[-1].hidden_out else f"{top[-1].name} does not give what is added"


def _items(output: object) -> int:
    if isinstance(output, Tensor):
        return 0
    plain = type(output) in (tuple, list) and bool(output)
    return len(output) if plain and isinstance(output[0], Tensor) else -1  # type: ignore[arg-type, index]


def find_branches(model: nn.Module, example: Example, blocks: Sequence[str]) -> dict[str, tuple[ResidualBranch, ...]]:
    """The branches of some blocks, in the order in which they run.

    Args:
        model: left as it is.
        example: what `secateur.model.call.call` takes.
        blocks: names of modules that hand on a hidden state.

    Returns:
        name of a block -> its branches; none where no residual sum is seen, as in fused kernels.

    Cost: one forward pass; all tensors of one block are alive at once.
    """
    finder = _Finder(model, blocks)
    with quiet(model, example), torch.no_grad(), finder.hooks():
        call(model, example)
    return {name: () if name in finder.often else tuple(finder.found.get(name, ())) for name in blocks}
