"""REAP: experts that add little to the tokens which the router sends to them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.criteria.base import Context, Criterion, register
from secateur.errors import UnsupportedError
from secateur.model import call
from secateur.model.padding import real_tokens
from secateur.model.tensors import named_tensors, require_finite
from secateur.registry import one_of
from secateur.statistics.gradients.functional import batches
from secateur.structure.trace import Args, Kwargs
from secateur.types import Group


@register
@dataclass(frozen=True, kw_only=True)
class Reap(Criterion):
    """Score an expert by the mean size of what it adds to the tokens that are routed to it.

    The idea: a block of experts adds g_j(x) f_j(x) to a token x for each expert j that the router picks; what is
    small for all of its tokens is missed least. The frequency does not count, so a specialist that few tokens need
    keeps its place. A bad choice for experts that do nearly the same: neither is small, though one could stand in
    for the other. Feed data of every kind that the model shall serve: an expert that no token reached scores 0.
    Tokens that `attention_mask` leaves out do not count.

    Formula: S_j = mean over the tokens x routed to j of g_j(x) ||f_j(x)||_2, with g_j the weight that the model
    really applies (normalised over the chosen experts where the model does so) and f_j the expert's output.

    Where one module takes the tokens, the chosen numbers and their weights, and gives the weighted sum, it is called
    once more for each of the chosen k, with one expert per token. Elsewhere each expert is left out in turn, and the
    block's outputs are subtracted. Either way the parts are added up and compared with what the block gave.

    Args:
        gated: False leaves g_j out, so that the router's preference does not count (mean activation norm).
        average: "routed" over the expert's own tokens; "all" over all tokens, so that rarely used experts go first.

    Raises:
        RecipeError: an unknown word, another granularity, or no data.
        UnsupportedError: the parts do not add up to the whole, gated=False where the weights are not to be seen, or
            a block that did not run.
        NonFiniteError: an output is NaN or Inf.

    Cost:
        Two forward passes over the data; where experts are left out in turn one pass of the block per expert.

    Source:
        Lasby, Lazarevich, Sinnadurai, Lie, Ioannou, Thangarasa, "REAP the Experts: Why Pruning Prevails for One-Shot
        MoE Compression", 2025 (the definition of S_j); Liu et al., "How to Score Experts for One-Shot MoE Expert
        Pruning", 2026 (gated, average).

    Example:
        Two experts that multiply by 2 and by 3; the first three tokens go to the first.

        >>> from secateur.types import Span
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.tensor([[[2.0]], [[3.0]]]))
        ...     def forward(self, x, chosen, weights):
        ...         return torch.einsum("tko,tk->to", torch.einsum("ti,tkoi->tko", x, self.weight[chosen]), weights)
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.experts = Experts()
        ...     def forward(self, x):
        ...         return self.experts(x, (x >= 4).long(), torch.full_like(x, 0.5))
        >>> group = Group("experts", "expert", (2,), (Span("experts.weight", torch.arange(2).view(2, 1, 1), "out"),))
        >>> data = [torch.tensor([[1.0], [2.0], [3.0], [4.0]])]
        >>> Reap().score(Context(Block(), [group], data=data))["experts"]
        tensor([2., 6.])
    """

    name: ClassVar[str] = "reap"
    summary: ClassVar[str] = "experts that add little to the tokens routed to them: mean of gate times output norm"
    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    speed: ClassVar[str] = "fast: forward passes, no labels"
    best_for: ClassVar[str] = "mixtures of experts, and data without labels"
    granularities: ClassVar[tuple[str, ...]] = ("expert",)
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})

    gated: bool = True
    average: Literal["routed", "all"] = "routed"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        one_of("average", self.average, ("routed", "all"))

    def _score(self, context: Context) -> dict[str, Tensor]:
        assert context.data is not None
        listeners = [_Listener(context.model, group, gated=self.gated) for group in context.groups]
        with torch.no_grad(), ExitStack() as hooks:
            for listener in listeners:
                listener.listen(hooks)
            for batch, _ in batches(context.model, context.data):
                example = call.to_example(batch)
                for listener in listeners:
                    listener.real = real_tokens(example)
                call.call(context.model, example)
        return {listener.group.name: listener.mean(over_all=self.average == "all") for listener in listeners}


class _Listener:
    """Sums what every expert of one block adds, whenever the block runs; `real`: tokens that are no padding."""

    def __init__(self, model: nn.Module, group: Group, *, gated: bool) -> None:
        self.group, self.gated = group, gated
        known = named_tensors(model)
        # The router has two dimensions; weights with one slice per expert have three.
        homes = {s.tensor.rpartition(".")[0] for s in group.spans if known[s.tensor].dim() > 2}
        if not homes:
            raise UnsupportedError(f"no weights [experts, ...] belong to group {group.name!r}")
        self.path = _common([span.tensor.rpartition(".")[0] for span in group.spans])
        self.block, self.experts = model.get_submodule(self.path), [model.get_submodule(home) for home in sorted(homes)]
        # Names within the block, since the block alone is called again below.
        cut = len(self.path) + 1 if self.path else 0
        self.weights = {  # of the experts, by their name within the block: what makes an expert silent
            s.tensor[cut:]: s.index
            for s in group.spans
            if s.index is not None and s.role != "state" and s.tensor.rpartition(".")[0] in homes and _first(s.index)
        }
        self.sums = torch.zeros(group.size, dtype=torch.float64)
        self.counts = torch.zeros(group.size, dtype=torch.float64)
        self.tokens = 0
        self.real: Tensor | None = None
        # Busy: our own calls run into our own hooks. Heard: the experts have told all that the block could tell.
        self._busy = self._heard = False

    def listen(self, hooks: ExitStack) -> None:
        """Put hooks on the block, to be removed when the stack closes."""
        if len(self.experts) == 1:  # several modules share the tokens in ways that cannot be seen from outside
            hooks.callback(self.experts[0].register_forward_hook(self._one_each, with_kwargs=True).remove)
        hooks.callback(self.block.register_forward_hook(self._left_out, with_kwargs=True).remove)

    def mean(self, *, over_all: bool) -> Tensor:
        """Mean over each expert's tokens, or over all."""
        if not self.tokens:
            raise UnsupportedError(f"the block of {self.group.name!r} did not run on the data")
        return self.sums / (self.tokens if over_all else self.counts.clamp(min=1))

    def _one_each(self, module: nn.Module, args: Args, kwargs: Kwargs, result: object) -> None:
        """Call the experts again with one of the chosen per token, for each of the k chosen."""
        if self._busy or not isinstance(result, Tensor):
            return
        routed = _routed(args, kwargs)
        if routed is None:
            return
        require_finite(result, self.group.name, what="the output of")
        chosen, weights = routed
        total, parts = torch.zeros(0), []
        self._busy = True
        try:
            # One of the chosen at a time with the weight 1: what comes out is f_j of the token, whatever j is.
            for slot in range(chosen.shape[-1]):
                # By identity: the module may take them in any place, by position or by name.
                one = {id(chosen): chosen[..., slot : slot + 1], id(weights): torch.ones_like(weights[..., :1])}
                given = [one.get(id(value), value) for value in args]
                named = {key: one.get(id(value), value) for key, value in kwargs.items()}
                part = module(*given, **named).double().reshape(-1, result.shape[-1])
                gate = weights[..., slot].double().reshape(-1)
                total = part * gate[:, None] + (total if slot else 0)
                size = part.norm(dim=1)
                parts.append((chosen[..., slot].reshape(-1), size * gate.abs() if self.gated else size))
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            return  # the module wants k experts per token, so they are left out in turn
        finally:
            self._busy = False
        # A module that does anything else with the tokens is found out here.
        if _same(total, result.double().reshape(-1, result.shape[-1]), result.dtype):
            counted = self._counted(chosen.shape[:-1].numel(), chosen.device)
            for numbers, sizes in parts:
                self._add(numbers[counted], sizes[counted])
            # Every token counts once, however many experts it is sent to.
            self.tokens += int(counted.sum())
            self._heard = True

    def _left_out(self, block: nn.Module, args: Args, kwargs: Kwargs, result: object) -> None:
        """Leave out each expert in turn, where the experts themselves could not be heard."""
        if self._busy:
            return
        if self._heard:
            self._heard = False
            return
        if not self.gated:
            raise UnsupportedError(
                f"the router's weights of {self.group.name!r} are not to be seen",
                why="no module takes tokens, the chosen numbers and their weights",
                hint="use criterion 'reap' with gated=True",
            )
        require_finite(call.outputs(result)[0], self.group.name, what="the output of")
        whole = call.outputs(result)[0].double()
        own = dict(block.named_parameters())
        self._busy = True
        try:
            # Zero weights make an expert silent without touching the model: parameters are swapped for the call.
            def without(gone: range) -> Tensor:
                silent: dict[str, Tensor] = {}
                for name, index in self.weights.items():
                    stays = (index < gone.start) | (index >= gone.stop)
                    silent[name] = own[name].detach() * stays.to(own[name])
                return call.outputs(functional_call(block, silent, args, kwargs))[0].double()

            # What the experts give together, apart from a shared path that always runs.
            rest, added = whole - without(range(self.group.size)), torch.zeros_like(whole)
            parts = []
            for number in range(self.group.size):
                part = whole - without(range(number, number + 1))
                added += part
                parts.append(part.norm(dim=-1).flatten())
        finally:
            self._busy = False
        if not _same(added, rest, call.outputs(result)[0].dtype):
            raise UnsupportedError(
                f"what the experts of {self.group.name!r} add cannot be told apart",
                why="the changes from leaving out each one do not add up to the change from leaving out all",
                hint="use criterion 'taylor', or 'magnitude'",
            )
        counted = self._counted(whole.shape[:-1].numel(), whole.device)
        for number, size in enumerate(parts):
            # Equal numbers cancel to rounding, not always to zero.
            used = counted & (size > 1e-6 * whole.norm(dim=-1).flatten())
            self._add(torch.full((int(used.sum()),), number), size[used])
        self.tokens += int(counted.sum())

    def _counted(self, tokens: int, device: torch.device) -> Tensor:
        """Which of so many tokens are no padding, bool [tokens]; all where that is not said of so many."""
        if self.real is None or self.real.numel() != tokens:
            return torch.ones(tokens, dtype=torch.bool, device=device)
        return self.real.flatten().to(device)

    def _add(self, numbers: Tensor, sizes: Tensor) -> None:
        numbers, sizes = numbers.cpu(), sizes.cpu()
        known = (numbers >= 0) & (numbers < self.group.size)  # others stand for "no expert"
        self.sums.index_add_(0, numbers[known], sizes[known])
        self.counts += torch.bincount(numbers[known], minlength=self.group.size)


def _routed(args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor] | None:
    """Chosen numbers and their weights: the one integer tensor, and the one floating one of its shape."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    chosen = [t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool and t.dim() >= 2]
    weights = [t for t in tensors if t.is_floating_point() and len(chosen) == 1 and t.shape == chosen[0].shape]
    # More than these two: the tokens themselves. An expert layer that is not told its tokens is none.
    return (chosen[0], weights[0]) if len(weights) == 1 and len(tensors) > 2 else None


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    # Sums in another order differ by a few roundings of the dtype; a wrong part differs by far more.
    tolerance = 1e-3 if torch.finfo(dtype).eps < 1e-5 else 0.05
    return a.shape == b.shape and (not b.numel() or bool((a - b).abs().max() <= tolerance * b.abs().max()))


def _first(index: Tensor) -> bool:
    """Whether units vary along the first dimension alone."""
    return index.shape[0] == index.numel()


def _common(paths: list[str]) -> str:
    """The innermost module that holds all of them."""
    split = [path.split(".") if path else [] for path in paths]
    same = 0
    while all(len(names) > same and names[same] == split[0][same] for names in split):
        same += 1
    return ".".join(split[0][:same])
