"""What whole blocks are worth: rules that look at the hidden state, at the loss, or at the place alone.

Every other criterion scores blocks too, by the weights they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.apply.layers import bypassed
from secateur.call import call, default_loss, evaluating, to_example
from secateur.criteria.base import require_finite, suggestion
from secateur.errors import InputError, RecipeError
from secateur.structure.layers import Stack, first_tensor, hidden_of
from secateur.types import Data, Loss

Scores = dict[str, Tensor]


class _Rule:
    """What the rules share."""

    def options(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {key: value for key, value in vars(self).items() if key != "name"}


@dataclass(frozen=True, kw_only=True)
class Every(_Rule):
    """Every k-th block of a stack goes first, the deepest of them first; needs no data.

    A bad choice where blocks differ much, as the first and last ones of most networks do. Ask for a sparsity of 1/k
    to remove exactly every k-th.

    Args:
        k: distance of the blocks that go first; 2 = every other.

    Cost: none.

    Source: Fan, Grave, Joulin, "Reducing Transformer Depth on Demand with Structured Dropout", 2020, section 3.2.
    """

    k: int = 2
    name: str = field(default="every", init=False)

    def __post_init__(self) -> None:
        """Refuse distances that are not whole and positive."""
        if type(self.k) is not int or self.k < 1:
            raise RecipeError(f"every: k is {self.k!r}", hint="k is an integer of at least 1; 2 is every other block")

    def score(self, model: nn.Module, stacks: Sequence[Stack], example: Any, data: Data | None, loss: Any) -> Scores:
        """Below 1 for every k-th block, above 1 for the others; falling with depth."""
        found = {}
        for stack in stacks:
            place = torch.arange(stack.size)
            found[stack.path] = ((place + 1) % self.k != 0) + 1 - (place + 1) / (stack.size + 1)
        return found


@dataclass(frozen=True, kw_only=True)
class BlockInfluence(_Rule):
    """How far a block turns the hidden state: 1 - the mean cosine of every position before and after it.

    A block that leaves the direction as it is can be left out. A bad choice for early blocks of deep networks that
    write rarely used but needed features; measure the loss where labels are at hand.

    Cost: one forward pass over the data.

    Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
    equation 1.
    """

    name: str = field(default="block-influence", init=False)

    def score(self, model: nn.Module, stacks: Sequence[Stack], example: Any, data: Data | None, loss: Any) -> Scores:
        """The influence of every block."""
        return _turns(model, stacks, example, data, lambda cosine: 1 - cosine)


@dataclass(frozen=True, kw_only=True)
class AngularDistance(_Rule):
    """The mean angle, in units of pi, by which a block turns the hidden state.

    Ranks much like block influence but weighs large turns less. A bad choice where positions matter very
    differently, for it averages over all of them.

    Cost: one forward pass over the data.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, equation 6, for one layer.
    """

    name: str = field(default="angular-distance", init=False)

    def score(self, model: nn.Module, stacks: Sequence[Stack], example: Any, data: Data | None, loss: Any) -> Scores:
        """The angle of every block."""
        return _turns(model, stacks, example, data, lambda cosine: torch.arccos(cosine.clamp(-1, 1)) / pi)


@dataclass(frozen=True, kw_only=True)
class LossIncrease(_Rule):
    """The rise of the measured loss when a block is left out.

    The most faithful of the rules for one block; a bad choice without labelled data, or where time is short.

    Args:
        greedy: measure again after every removal, so that blocks that stand in for each other are not both taken.

    Cost: one pass over the data per free block; with greedy one per pair of them, about.

    Source: leave-one-out; Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks", 2024, algorithm 1 (greedy).
    """

    greedy: bool = False
    name: str = field(default="loss-increase", init=False)

    def score(self, model: nn.Module, stacks: Sequence[Stack], example: Any, data: Data | None, loss: Any) -> Scores:
        """The rise of every free block; with greedy the order of removal."""
        if data is None:
            raise RecipeError("criterion 'loss-increase' needs data", hint="pass data=, an iterable of batches")
        found = {stack.path: torch.zeros(stack.size, dtype=torch.float64) for stack in stacks}
        free = [(stack.path, i, stack.blocks[i].name) for stack in stacks for i in stack.free]
        if not self.greedy:
            whole = mean_loss(model, data, loss)
            for path, i, name in free:
                found[path][i] = mean_loss(model, data, loss, without=[name]) - whole
            return found
        gone: list[str] = []
        for turn in range(len(free)):
            losses = [mean_loss(model, data, loss, without=[*gone, name]) for _, _, name in free]
            path, i, name = free.pop(min(range(len(losses)), key=losses.__getitem__))
            found[path][i] = turn
            gone.append(name)
        return found


Rule = Every | BlockInfluence | AngularDistance | LossIncrease
RULES: Mapping[str, Callable[..., Rule]] = {
    "every": Every,
    "block-influence": BlockInfluence,
    "angular-distance": AngularDistance,
    "loss-increase": LossIncrease,
}


def layer_rule(criterion: Any) -> Rule | None:
    """The rule of a name, of {"name": ..., options} or itself; None where it is an ordinary criterion.

    Raises:
        RecipeError: an option that the rule does not have.
    """
    if isinstance(criterion, (Every, BlockInfluence, AngularDistance, LossIncrease)):
        return criterion
    name = criterion.get("name") if isinstance(criterion, Mapping) else criterion
    if not isinstance(name, str) or name not in RULES:
        return None
    options = {k: v for k, v in criterion.items() if k != "name"} if isinstance(criterion, Mapping) else {}
    known = list(RULES[name]().options())
    for option in options:
        if option not in known:
            raise RecipeError(f"criterion {name!r} has no option {option!r}", hint=suggestion(option, known))
    return RULES[name](**options)


def mean_loss(model: nn.Module, data: Data, loss: Loss | None, *, without: Sequence[str] = ()) -> float:
    """Mean loss over the batches, in eval mode, with some modules as identity.

    Raises:
        InputError: no batch, or a loss that is not finite.
    """
    total, count = 0.0, 0
    with evaluating(model), bypassed(model, without):
        for batch in data:
            value = (loss or default_loss)(model, batch).detach()
            require_finite(value, "loss", what=f"batch {count}:")
            total, count = total + float(value), count + 1
    if not count:
        raise InputError("The data holds no batch.", hint="Pass data with at least one batch.")
    return total / count


def _turns(
    model: nn.Module,
    stacks: Sequence[Stack],
    example: Any,
    data: Data | None,
    measure: Callable[[Tensor], Tensor],
) -> Scores:
    """Mean over all positions of a measure of the cosine between a block's input and output, in float64."""
    sums = {stack.path: torch.zeros(stack.size, dtype=torch.float64) for stack in stacks}
    counts = {stack.path: torch.zeros(stack.size, dtype=torch.float64) for stack in stacks}
    before: dict[tuple[str, int], Tensor] = {}

    def enter(path: str, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = hidden_of(args, kwargs)
            if hidden is not None:
                before[path, i] = hidden.detach().clone()

        return hook

    def leave(path: str, i: int, dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden, start = first_tensor(output), before.pop((path, i))
            if hidden is None:
                return
            require_finite(hidden, f"{path}.{i}", what="output of block")
            value = measure(functional.cosine_similarity(start.double(), hidden.detach().double(), dim=dim))
            sums[path][i] += float(value.sum())
            counts[path][i] += value.numel()

        return hook

    with evaluating(model), ExitStack() as handles:
        for stack in stacks:
            for i in stack.free:
                module = model.get_submodule(stack.blocks[i].name)
                first = module.register_forward_pre_hook(enter(stack.path, i), with_kwargs=True)
                second = module.register_forward_hook(leave(stack.path, i, stack.blocks[i].channel_dim))
                handles.callback(first.remove)
                handles.callback(second.remove)
        for inputs in [example] if data is None else (to_example(batch) for batch in data):
            call(model, inputs)
    return {path: sums[path] / counts[path].clamp(min=1) for path in sums}
