"""Residual branches of blocks, found by execution: attention and MLP of a transformer layer, each by itself.

No module is known by name. A branch ends in a sum of two tensors of the hidden state's shape of which one, the trunk,
was there before the first weight of the branch was multiplied. Its modules are those that run between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.model.bypass import bypassed, first_tensor, hidden_of
from secateur.model.call import call
from secateur.structure.capture import quiet
from secateur.structure.sums import Sums
from secateur.types import Example, Group


class Place(NamedTuple):
    """Where a sum is written: what stays the same when other modules are gone.

    Args:
        module: name of the innermost module that ran.
        number: which of its own sums.
    """

    module: str
    number: int


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
class Branch:
    """What a block computes and adds to its hidden state.

    Args:
        block: name of the block.
        place: of the sum that ends it.
        side: which operand of the sum it is, 0 or 1.
        modules: that run for it alone, in this order; those within another one are not listed.
        why: why these cannot be taken out; "" if they can.
    """

    block: str
    place: Place
    side: int
    modules: tuple[Answering, ...]
    why: str = ""


Unit = Branch | str  # what may be left out of a run: a branch, or a block by its name


def units_of(group: Group) -> Sequence[Unit]:
    """What the units of a group of layers or sub-blocks are."""
    units: Sequence[Unit] = group.attributes.get("branches") or group.attributes["blocks"]
    return units[: group.size]


@dataclass
class _Run:
    """What a module did within a block."""

    name: str
    parent: str
    enter: int
    weighs: bool  # whether it holds parameters
    leave: int = -1
    items: int = -1  # -1: neither a tensor nor a tuple that begins with one
    hidden_in: bool = False
    hidden_out: bool = False


@dataclass
class _Ended:
    """A sum that ends a branch, and when its trunk came to be."""

    place: Place
    side: int
    since: int
    until: int


class _Running(Sums):
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

    def place(self) -> Place:
        """Of the sum that is met; call it once for each."""
        name = self.stack[-1]
        self.counts[name] = self.counts.get(name, -1) + 1
        return Place(name, self.counts[name])

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


class _Finder(_Running):
    """Tells which sums end a branch, and which modules ran for it."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__(model, blocks)
        self.found: dict[str, list[Branch]] = {}
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
        self.runs.append(_Run(name, self.stack[-1], self.clock, weighs, hidden_in=self._fits(hidden)))

    def left(self, name: str, output: object) -> None:
        self.clock += 1
        run = next(run for run in reversed(self.runs) if run.name == name)
        run.leave, run.items, run.hidden_out = self.clock, _items(output), self._fits(first_tensor(output))

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

    def _branch(self, found: _Ended) -> Branch:
        inside = [run for run in self.runs if found.since < run.enter and -1 < run.leave <= found.until]
        names = {run.name for run in inside}
        names_run = [run.name for run in self.runs]
        # Without weights and in several places: a dropout of the whole block, which is nobody's own.
        own = [run for run in inside if run.parent not in names and (run.weighs or names_run.count(run.name) == 1)]
        last = max((number for number, run in enumerate(own) if run.weighs), default=-1)
        top = own[: last + 1]  # a dropout or an activation behind them stays: it makes zeros of zeros, or it is seen
        modules = tuple(Answering(run.name, run.items) for run in top)
        return Branch(self.block, found.place, found.side, modules, self._fault(top))

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


def find_branches(model: nn.Module, example: Example, blocks: Sequence[str]) -> dict[str, tuple[Branch, ...]]:
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


class _Skipping(_Running):
    """The sums that end some branches hand on their trunk alone."""

    def __init__(self, model: nn.Module, branches: Sequence[Branch]) -> None:
        super().__init__(model, list(dict.fromkeys(branch.block for branch in branches)))
        self.sides = {branch.place: branch.side for branch in branches}

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> tuple[Tensor, bool] | None:
        side = self.sides.get(self.place())
        if side is None:
            return None
        trunk = operands[1 - side]
        # A sum that writes into its first operand: into the trunk itself, or over what was added.
        return (trunk.clone() if writes else trunk), writes

    def met(self, known: tuple[Tensor, bool] | None, total: Tensor) -> Tensor:
        if known is None:
            return total
        trunk, writes = known
        return total.copy_(trunk) if writes else trunk.to(total.dtype, copy=True)


@contextmanager
def left_out(model: nn.Module, units: Sequence[Unit]) -> Iterator[None]:
    """Run a model without some blocks or branches: everything is computed as ever, and not added.

    Args:
        model: patched inside the context, then as before.
        units: branches, or names of blocks.
    """
    branches = [unit for unit in units if isinstance(unit, Branch)]
    with bypassed(model, [unit for unit in units if isinstance(unit, str)]), _Skipping(model, branches).hooks():
        yield


class _Adding(_Running):
    """Measures what some branches add."""

    def __init__(self, model: nn.Module, branches: Sequence[Branch]) -> None:
        super().__init__(model, list(dict.fromkeys(branch.block for branch in branches)))
        self.sides = {branch.place: branch.side for branch in branches}
        self.most: dict[Place, float] = {}

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> None:
        place = self.place()
        if place in self.sides:
            self.most[place] = float(operands[self.sides[place]].detach().abs().max())


def added(model: nn.Module, example: Example, branches: Sequence[Branch]) -> dict[Place, float]:
    """The largest number that each branch adds to its hidden state; sums that are not met are left out.

    Cost: one forward pass.
    """
    adding = _Adding(model, branches)
    with quiet(model, example), torch.no_grad(), adding.hooks():
        call(model, example)
    return adding.most


Seen = Callable[[int, Tensor], None]


class _Reading(_Running):
    """Shows the hidden state before and after some branches."""

    def __init__(self, model: nn.Module, branches: Mapping[int, Branch], enter: Seen, leave: Seen) -> None:
        super().__init__(model, list(dict.fromkeys(branch.block for branch in branches.values())))
        self.wanted = {branch.place: (number, branch.side) for number, branch in branches.items()}
        self.enter, self.leave = enter, leave

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> int | None:
        number, side = self.wanted.get(self.place(), (None, 0))
        if number is not None:
            self.enter(number, operands[1 - side])
        return number

    def met(self, known: int | None, total: Tensor) -> Tensor:
        if known is not None:
            self.leave(known, total)
        return total


@contextmanager
def reading(model: nn.Module, units: Mapping[int, Unit], enter: Seen, leave: Seen) -> Iterator[None]:
    """Show the hidden state on both sides of some blocks or branches, in the order of the run.

    Args:
        model: watched inside the context.
        units: number -> branch, or name of a block.
        enter: called as ``enter(number, hidden)`` with what a unit adds to; copy what is to be kept.
        leave: called as ``leave(number, hidden)`` with the hidden state behind it, if a tensor is handed on.
    """
    branches = {number: unit for number, unit in units.items() if isinstance(unit, Branch)}
    with ExitStack() as stack:
        for number, unit in units.items():
            if isinstance(unit, str):
                block = model.get_submodule(unit)
                stack.callback(block.register_forward_pre_hook(_entering(number, enter), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(_leaving(number, leave)).remove)
        if branches:
            stack.enter_context(_Reading(model, branches, enter, leave).hooks())
        yield


def _entering(number: int, enter: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        hidden = hidden_of(args, kwargs)
        assert hidden is not None
        enter(number, hidden)

    return hook


def _leaving(number: int, leave: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        hidden = first_tensor(output)
        if hidden is not None:
            leave(number, hidden)

    return hook
