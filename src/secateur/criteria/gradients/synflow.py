"""SynFlow: synaptic flow, the share of a weight in all paths from input to output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.criteria.base import Context, Criterion, register
from secateur.criteria.gradients.loss_gradient import unit_values
from secateur.criteria.sums import counts
from secateur.errors import InputError, NonFiniteError, RecipeError, UnsupportedError
from secateur.model.call import call, describe, outputs, to_example
from secateur.model.forms import map_tensors
from secateur.model.samples import with_batch_size
from secateur.registry import listed, one_of
from secateur.structure.trace import Args, Kwargs
from secateur.types import Example, Group

PASSED = frozenset(
    {
        *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "rrelu", "prelu", "hardtanh", "hardtanh_"),
        *("elu", "elu_", "celu", "selu", "gelu", "silu", "mish", "hardswish", "softplus"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
    }
)
_LARGEST = 1e30  # scores leave as float32


@register
@dataclass(frozen=True, kw_only=True)
class SynFlow(Criterion):
    """Score a weight by |w| dR/d|w|, R the output of the network on ones with all weights made positive.

    The idea: R counts all paths from input to output, each weighted by the product of its weights, and the
    score is the part of R that flows through the weight. It needs no data, and no layer is ever lost: the
    scores of every layer add up to the same R. A bad choice where the network is trained: the data is
    not looked at; and for networks that are not a chain of weights and rectifiers: attention, gates
    and squeeze-and-excitation multiply activations, and are refused.

    Formula: R = 1^T |W_L| ... |W_1| 1 and s = |w| dR/d|w|, summed over a unit. Biases are out; rectifiers and
    smooth activations pass positive values as they are; norms multiply by |gamma|. Everything is computed in
    float64 on a copy. That R doubles when a positive input doubles is checked.

    Args:
        rounds: 1 scores once. More removes weights along the density (1 - sparsity)^(k / rounds) in rounds k and
            scores again after each, as published with 100; the score is then the place in the order of
            removal, exact up to 2^24 units.
        sparsity: fraction that the last round reaches; needed with more than one round.
        norm: "initial" takes norms with the statistics of a fresh network, that is |gamma| alone; "running"
            divides the |gamma| of batch norms by the root of their running variance.

    Raises:
        RecipeError: rounds without sparsity, numbers out of range, or neither example nor data to take the
            input's shape from.
        UnsupportedError: integer inputs, or a network that is not linear on positive inputs.
        NonFiniteError: R overflows float64 in a network with branches. (In a plain chain layers are
            normalised, which changes all scores by one factor.)
        InputError: no path leads from the input to the output.

    Cost:
        One forward and backward pass of one sample in float64 per round, and a copy of the model.

    Source:
        Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving
        synaptic flow", 2020, equation 1 and algorithm 1.

    Example:
        >>> from torch import nn
        >>> from secateur.types import Group, Span
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> first = Group("first", "element", (2, 2), (Span("0.weight", None, "self"),))
        >>> SynFlow().score(Context(net, [first], example=torch.zeros(1, 2)))["first"]
        tensor([[2.0000, 4.0000],
                [0.5000, 3.0000]])
    """

    name: ClassVar[str] = "synflow"
    summary: ClassVar[str] = "share of a weight in all paths from input to output; no data, no layer is lost"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    speed: ClassVar[str] = "fast: no data"
    best_for: ClassVar[str] = "pruning before training, at high sparsity"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})

    rounds: int = 1
    sparsity: float | None = None
    norm: Literal["initial", "running"] = "initial"

    def __post_init__(self) -> None:
        """Refuse numbers out of range and unknown words."""
        one_of("norm", self.norm, ("initial", "running"))
        if self.rounds < 1:
            raise RecipeError(f"rounds={self.rounds} of synflow", hint="use at least 1")
        if self.rounds > 1 and self.sparsity is None:
            raise RecipeError("rounds of synflow need the sparsity that the last one reaches")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise RecipeError(f"sparsity={self.sparsity} is not in [0, 1)")

    def _score(self, context: Context) -> dict[str, Tensor]:
        flow = _Flow(context, self.norm)
        if self.rounds == 1:
            return _in_range({g.name: s.view(g.shape) for g, s in _per_unit(context, flow.scores())})
        return self._order_of_removal(context, flow)

    def _order_of_removal(self, context: Context, flow: _Flow) -> dict[str, Tensor]:
        sizes = [group.size for group in context.groups]
        total, place = sum(sizes), torch.zeros(sum(sizes))
        alive = torch.ones(total, dtype=torch.bool)
        for number in range(1, self.rounds + 1):
            scores = torch.cat([s.cpu() for _, s in _per_unit(context, flow.scores())])
            # Every round keeps the same share of what is left, as in the paper: large steps at the end empty a layer.
            keep = round(total * (1 - (self.sparsity or 0.0)) ** (number / self.rounds))
            order = torch.argsort(scores.masked_fill(~alive, torch.inf), stable=True)
            dead = total - int(alive.sum())
            leaving = order[: int(alive.sum()) - keep]
            # A score is the place in the order of removal, over all rounds.
            place[leaving] = torch.arange(dead, dead + len(leaving), dtype=place.dtype)
            alive[leaving] = False
            flow.mask(dict(zip([g.name for g in context.groups], torch.split(alive, sizes), strict=True)))
        scores = torch.cat([s.cpu() for _, s in _per_unit(context, flow.scores())])
        order = torch.argsort(scores.masked_fill(~alive, torch.inf), stable=True)[: int(alive.sum())]
        place[order] = torch.arange(total - len(order), total, dtype=place.dtype)
        parts = torch.split(place, sizes)
        return {g.name: part.view(g.shape) for g, part in zip(context.groups, parts, strict=True)}


class _Flow:
    """The positive linear network of a model, and the flow through its weights.

    Args:
        context: model, groups, and an example or data.
        norm: how norms are taken.
    """

    def __init__(self, context: Context, norm: str) -> None:
        self._groups = context.groups
        self._ones = _ones(context)
        self._mode = _Linear(norm)
        # In double precision: R is a sum over all paths, and their products leave float32 in a few dozen layers.
        self._model = copy.deepcopy(context.model).double().eval()
        self._model.requires_grad_(False)
        complex_ones = [name for name, parameter in self._model.named_parameters() if parameter.is_complex()]
        if complex_ones:
            raise UnsupportedError(
                f"synflow cannot score a model with complex weights: {listed(complex_ones)}",
                why="its flow is that of a network whose weights are positive numbers",
                hint="use another criterion, such as magnitude",
            )
        with torch.no_grad():
            # A bias starts no path at the input, so it would add a constant to R, which is to be linear.
            for name, parameter in self._model.named_parameters():
                parameter.zero_() if name.split(".")[-1].endswith("bias") else parameter.abs_()
        spans = (s for g in context.groups for s in g.spans if counts(s.role, None))
        known = dict(self._model.named_parameters())
        self._weights = {s.tensor: known[s.tensor] for s in spans if s.tensor in known}
        self._check()

    def mask(self, keep: Mapping[str, Tensor]) -> None:
        """Zero the weights of the units that are gone."""
        for group in self._groups:
            gone = ~keep[group.name].cpu()
            for span in group.spans:
                if span.tensor in self._weights:
                    weight = self._weights[span.tensor]
                    unit = span.units(weight)
                    weight.mul_((~(gone.to(unit.device)[unit.clamp(min=0)] & (unit >= 0))).to(weight))

    def scores(self) -> dict[str, Tensor]:
        """|w| dR/d|w| by parameter name; layers are normalised if R leaves the range of float64."""
        found, total = self._scores(self._weights)
        if 0 < total < torch.inf and all(bool(torch.isfinite(s).all()) for s in found.values()):
            return found
        layers = {n: p for n, p in self._model.named_parameters() if bool(p.any())}
        kept = {name: weight.clone() for name, weight in layers.items()}
        for weight in layers.values():
            weight.mul_(weight.shape[0] / weight.sum())  # the mean output of a layer on ones becomes 1
        found, total = self._scores(self._weights | layers)
        for name, weight in layers.items():
            weight.copy_(kept[name])
        if not total > 0:
            raise InputError(
                "no path leads from the input to the output", hint="lower the sparsity; check for zero weights"
            )
        if any(abs(float(found[name].sum()) / total - 1) > 1e-6 for name in layers):
            raise NonFiniteError(
                "the synaptic flow leaves the range of float64",
                why="layers of a network with branches cannot be normalised without changing the order",
                hint="scale the weights of the network down, or use another criterion",
            )
        return {name: found[name] for name in self._weights}

    def _scores(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        for weight in weights.values():
            weight.requires_grad_(True)
        total = self._run(self._ones)
        grads: Iterable[Tensor | None] = [None] * len(weights)
        if total.requires_grad:
            grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
        self._model.requires_grad_(False)
        scores = {
            name: torch.zeros_like(weight) if g is None else g * weight
            for (name, weight), g in zip(weights.items(), grads, strict=True)
        }
        return scores, float(total.detach())

    def _run(self, example: Example) -> Tensor:
        with self._mode:
            found = outputs(call(self._model, example))
        # Every output counts, where there are several: R is a sum over all ends of paths.
        sums = [tensor.double().sum() for tensor in found if tensor.is_floating_point()]
        return torch.stack(sums).sum()

    def _check(self) -> None:
        """R is linear in a positive input: no constant, and twice the input gives twice the output."""
        generator = torch.Generator().manual_seed(0)
        # Not on the ones: there attention looks linear, because all positions are alike.
        some = map_tensors(self._ones, lambda t: t * torch.rand(t.shape, generator=generator).to(t))
        with torch.no_grad():
            once, twice = self._run(some), self._run(map_tensors(some, lambda t: 2 * t))
        if bool(torch.isfinite(twice)) and not torch.allclose(2 * once, twice, rtol=1e-9):
            raise UnsupportedError(
                "synaptic flow is not defined for this network",
                why=f"on positive inputs it is not linear: R = {float(once):.6g} becomes {float(twice):.6g} when "
                "the input doubles (attention, gates, or constants that are added)",
                hint="use 'snip', 'grasp' or 'magnitude'",
            )


class _Linear(TorchFunctionMode):
    """Norms become a factor per channel, activations the identity: what they are on the positive network."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self._norm = norm

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        factor = _FACTORS.get(func)
        if factor is not None:
            return factor(self._norm, *args, **kwargs)
        if getattr(func, "__name__", "") in PASSED:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _batch_norm(
    norm: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if norm == "running" and running_var is not None:
        input = input / (running_var + eps).sqrt().view(1, -1, *[1] * (input.dim() - 2))
    return _times(input, weight, 1)


# Of the norms over features only the scale is left: what they divide by would make R depend on the input.
def _layer_norm(
    norm: str,
    input: Tensor,
    normalized_shape: object,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return input if weight is None else input * weight


def _rms_norm(
    norm: str, input: Tensor, normalized_shape: object, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return input if weight is None else input * weight


def _group_norm(
    norm: str,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _times(input, weight, 1)


def _instance_norm(
    norm: str,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    return _times(input, weight, 1)


_FACTORS: dict[Callable[..., object], Callable[..., Tensor]] = {
    functional.batch_norm: _batch_norm,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    functional.instance_norm: _instance_norm,
}


def _times(input: Tensor, weight: Tensor | None, dim: int) -> Tensor:
    return input if weight is None else input * weight.view(-1, *[1] * (input.dim() - 1 - dim))


def _ones(context: Context) -> Example:
    example = context.example
    if example is None and context.data is not None:
        example = next((to_example(batch) for batch in context.data), None)
    if example is None:
        raise RecipeError("synflow needs the shape of the input", hint="pass example=, an input of the model")
    return map_tensors(with_batch_size(example, 1), _as_ones)


def _as_ones(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise UnsupportedError(
            f"synaptic flow has no input of ones for {describe(tensor)}",
            why="it is defined for real inputs, not for tokens and masks",
            hint="use 'snip', 'grasp' or 'magnitude'",
        )
    return torch.ones_like(tensor, dtype=torch.float64)


def _per_unit(context: Context, scores: Mapping[str, Tensor]) -> list[tuple[Group, Tensor]]:
    missing = [g.name for g in context.groups if not any(s.tensor in scores for s in g.spans)]
    if missing:
        raise InputError(f"no parameter of {listed(missing)} takes part in the flow")
    return [(group, unit_values(scores, group, None)) for group in context.groups]


def _in_range(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """One factor for all scores, where they would leave the range of float32."""
    largest = max((float(score.max()) for score in scores.values() if score.numel()), default=0.0)
    if 1 / _LARGEST < largest < _LARGEST:
        return scores
    return {name: score * (_LARGEST / largest) for name, score in scores.items()}
