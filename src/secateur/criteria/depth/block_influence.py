"""Block influence: how far a block (transformer layer), or a branch of it, turns the hidden state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.criteria.base import Context, Criterion, register
from secateur.model import call
from secateur.model.padding import real_tokens
from secateur.model.tensors import require_finite
from secateur.statistics.gradients.functional import batches
from secateur.structure.left_out import reading, units_of
from secateur.types import Group

TINY = 1e-12


@register
@dataclass(frozen=True, kw_only=True)
class BlockInfluence(Criterion):
    """Score a block, or a branch of one, by 1 - the mean cosine of the hidden state before and after it.

    The idea: in deep residual networks late blocks add little, and input and output point the same way. A bad choice
    for early blocks that write rarely used but needed features, and for the last ones, which change the scale and
    matter more than the angle says: measure the loss where labels are at hand. Blocks are scored alone: leaving out
    several neighbours costs more than the sum.

    Formula: BI_i = 1 - E cos(x_i, x_{i+1}) over all positions (tokens but padding, pixels) of all samples; the feature
    is the last dimension of sequences and the second of images. A block that may not go scores as the best of the
    others.

    Raises:
        RecipeError: another granularity than layer and sub_block, or no data.
        NonFiniteError: a hidden state is NaN or Inf.

    Cost:
        One forward pass over the data; hidden states of one block are kept.

    Source:
        Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen, "ShortGPT: Layers in Large Language Models are More Redundant Than
        You Expect", 2024, equation 1.

    Example:
        The first block turns the plane by 90 degrees, the second does nothing.

        >>> turn, nothing = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> _ = turn.weight.data.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> _ = nothing.weight.data.copy_(torch.eye(2))
        >>> blocks = {"blocks": ("0", "1"), "free": (True, True), "channel_dim": (-1, -1)}
        >>> group = Group("blocks", "layer", (2,), (), attributes=blocks)
        >>> context = Context(nn.Sequential(turn, nothing), [group], data=[torch.tensor([[1.0, 2.0]])])
        >>> BlockInfluence().score(context)["blocks"].round(decimals=6)
        tensor([1., 0.])
    """

    name: ClassVar[str] = "block-influence"
    summary: ClassVar[str] = "blocks that hardly turn the hidden state matter least: 1 - mean cosine"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "fast: a forward pass, no labels"
    best_for: ClassVar[str] = "layers of deep transformers, and data without labels"
    comparable: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = ("layer", "sub_block")
    promises: ClassVar[frozenset[str]] = frozenset({"batch_split", "zero_lowest"})

    def _score(self, context: Context) -> dict[str, Tensor]:
        turns = mean_over_positions(context, lambda cosine: 1 - cosine)
        return {group.name: best_where_locked(group, turns[group.name]) for group in context.groups}


def best_where_locked(group: Group, scores: Tensor) -> Tensor:
    """Scores in which the blocks that may not go are as good as the best of the others."""
    # Not infinity: scores must be finite, and a locked block takes no part in the choice anyway.
    free = torch.tensor(group.attributes["free"][: group.size])
    return torch.where(free, scores, scores[free].max() if bool(free.any()) else scores)


def mean_over_positions(context: Context, measure: Callable[[Tensor], Tensor], *, span: int = 1) -> dict[str, Tensor]:
    """Mean over all positions but padding of a measure of the cosine of a block's input and a later one's output.

    Args:
        context: groups of layers, and the data.
        measure: cosines to values, element by element.
        span: how many neighbouring free blocks lie between input and output; 1 = the block alone.

    Returns:
        Group name -> float64 [blocks], at the place of the first of the blocks; NaN where such a run does not exist.
    """
    assert context.data is not None
    paths = {group.name: _Path(group, measure, span) for group in context.groups}
    with torch.no_grad(), ExitStack() as hooks:
        for path in paths.values():
            path.listen(context.model, hooks)
        for batch, _ in batches(context.model, context.data):
            example = call.to_example(batch)
            for path in paths.values():
                path.real = real_tokens(example)
            call.call(context.model, example)
    return {name: path.sums / path.counts for name, path in paths.items()}


class _Path:
    """The hidden state on its way through one stack; `real` says which tokens of the batch are no padding."""

    def __init__(self, group: Group, measure: Callable[[Tensor], Tensor], span: int) -> None:
        self.group, self.measure, self.span = group, measure, span
        self.sums = torch.zeros(group.size, dtype=torch.float64)
        self.counts = torch.zeros(group.size, dtype=torch.float64)
        self._before: dict[int, Tensor] = {}
        self.real: Tensor | None = None

    def listen(self, model: nn.Module, hooks: ExitStack) -> None:
        """Watch the free units, until the stack closes."""
        # Locked ones may not even have a hidden state that could be compared.
        free = {place: unit for place, unit in enumerate(units_of(self.group)) if self.group.attributes["free"][place]}
        hooks.enter_context(reading(model, free, self._enter, self._leave))

    def _enter(self, place: int, hidden: Tensor) -> None:
        self._before[place] = hidden.detach().clone()  # blocks may add in place

    def _leave(self, place: int, hidden: Tensor) -> None:
        dim, free = self.group.attributes["channel_dim"][place], self.group.attributes["free"]
        # The run ends here; it began `span - 1` blocks before.
        first = place - self.span + 1
        start = self._before.pop(first, None)
        if start is None or not all(free[first : place + 1]):
            return
        require_finite(hidden, self.group.attributes["blocks"][place], what="the hidden state after")
        # 1 - cos is a small difference of numbers near one, which float32 would round away.
        x, y = start.double(), hidden.double()
        cosine = (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim)).clamp(min=TINY)
        if self.real is not None and cosine.shape == self.real.shape:
            cosine = cosine[self.real.to(cosine.device)]
        # Rounding may take a cosine above one, where arccos has no value.
        self.sums[first] += self.measure(cosine.clamp(-1, 1)).sum().cpu()
        self.counts[first] += cosine.numel()
