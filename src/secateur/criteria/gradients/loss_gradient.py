"""What criteria that differentiate the loss share: walking the data, mean gradients, refusals, normalisation.

The mean gradient is that of L = (1/N) sum_n l_n: batches are weighted by their number of samples, so that a
short last batch counts for what it holds. It is exact for every loss that averages over samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from secateur.criteria.base import Context, Criterion
from secateur.criteria.sums import counts
from secateur.errors import InputError, NonFiniteError, UnsupportedError
from secateur.model.call import default_loss, describe
from secateur.model.kernels import exact_derivatives
from secateur.model.share import everywhere, over_processes
from secateur.registry import listed, one_of
from secateur.statistics.gradients.functional import batches, require_finite_loss
from secateur.types import Batch, Data, Group, Loss

WEIGHTS = frozenset({"out", "in", "self"})
ROLES = {
    "all": None,
    "out": frozenset({"out", "bias", "scale", "self"}),
    "in": frozenset({"in", "self"}),
}


class StationaryWarning(UserWarning):
    """The mean gradient is -lambda w: first-order scores rank as magnitude."""


class MeanGradients:
    """Stands for data of which nothing is known but the gradient of the mean loss.

    Args:
        by_name: parameter name -> gradient.
    """

    def __init__(self, by_name: Mapping[str, Tensor]) -> None:
        self.by_name = by_name

    def __iter__(self) -> Iterator[Batch]:
        """Refuse to be read.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "of a sharded model's data only the mean gradient is known, and the criterion asks for more",
            hint="gradient, snip and taylor with reduce signed, abs, mean or squared need no more; or weights alone",
        )


@dataclass(frozen=True, kw_only=True)
class LossCriterion(Criterion):
    """Base of the criteria that need gradients of the loss. Not a criterion of its own.

    Args:
        normalize: makes the groups of one call comparable where the raw scores are not. "none"; "mean" and
            "l2" divide by the mean |score| and by the L2 norm of the group's scores.
        frozen: "error" refuses parameters with requires_grad=False, "score" scores them all the same.
        unused: "error" refuses parameters that the loss never reaches, "zero" gives them the gradient 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels", "gradients"})

    normalize: Literal["none", "mean", "l2"] = "none"
    frozen: Literal["error", "score"] = "error"
    unused: Literal["error", "zero"] = "error"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        one_of("normalize", self.normalize, ("none", "mean", "l2"))
        one_of("frozen", self.frozen, ("error", "score"))
        one_of("unused", self.unused, ("error", "zero"))

    def finish(self, values: Tensor) -> Tensor:
        """Normalise the scores of a group."""
        if self.normalize == "none":
            return values
        wide = values.to(torch.float64)
        size = wide.abs().mean() if self.normalize == "mean" else wide.norm()
        return wide / size if float(size) > 0 else wide

    def trainable(self, context: Context) -> dict[str, nn.Parameter]:
        """The parameters that count, made to require gradients; the others made not to.

        Raises:
            InputError: a frozen parameter and frozen="error"; the message names it.
        """
        known = dict(context.model.named_parameters())
        chosen = {name: known[name] for name in self.weights(context)}
        fixed = [name for name, parameter in chosen.items() if not parameter.requires_grad]
        if fixed and self.frozen == "error":
            raise InputError(
                f"no gradient for {listed(fixed)}",
                why="requires_grad is False",
                hint="protect them, set frozen='score', or choose a criterion without gradients",
            )
        # The graph then reaches back only as far as the first weight that counts.
        for parameter in known.values():
            parameter.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return chosen

    def mean_gradient(self, context: Context) -> dict[str, Tensor]:
        """Gradient of the mean loss over the data, by parameter name, in float32 or the wider dtype."""
        parameters = self.trainable(context)
        if isinstance(context.data, MeanGradients):
            known = context.data.by_name
            return self.complete({name: known[name] for name in parameters if name in known}, parameters)
        total: dict[str, Tensor] = {}
        samples = 0
        for gradient, size in self.batch_gradients(context, parameters):
            samples += size
            for name, value in gradient.items():
                total[name] = total[name].add_(value, alpha=size) if name in total else value * size
        total, samples = over_processes(context.data, total, samples)
        return self.complete({n: t / samples for n, t in total.items()}, parameters)

    def batch_gradients(
        self, context: Context, parameters: Mapping[str, nn.Parameter]
    ) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Gradient of the loss of every batch, with the number of its samples.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or Inf.
        """
        for number, (batch, size) in enumerate(walk(context)):
            backward(context, batch, number)
            gradient = {n: accumulable(p.grad) for n, p in parameters.items() if p.grad is not None}
            for parameter in parameters.values():
                parameter.grad = None
            for name, value in gradient.items():
                require_finite_gradient(value, name)
            yield gradient, size

    def mean_over_batches(
        self,
        context: Context,
        parameters: Mapping[str, nn.Parameter],
        value: Callable[[Mapping[str, Tensor], Group], Tensor],
    ) -> dict[str, Tensor]:
        """Mean over the batches, weighted by their samples, of what their products of gradient and weight give.

        Args:
            context: with data.
            parameters: those that count, as `trainable` gives them.
            value: (parameter name -> gradient times weight, group) -> [units].

        Returns:
            group name -> [units].
        """
        weights = {name: accumulable(parameter) for name, parameter in parameters.items()}
        total: dict[str, Tensor] = {}
        reached: dict[str, Tensor] = {}
        samples = 0
        for gradient, size in self.batch_gradients(context, parameters):
            samples += size
            reached |= gradient
            product = {name: own * weights[name] for name, own in gradient.items()}
            for group in context.groups:
                part = value(product, group) * size
                total[group.name] = total[group.name] + part if group.name in total else part
        self.complete(everywhere_reached(context.data, reached, parameters), parameters)
        total, samples = over_processes(context.data, total, samples)
        return {name: one / samples for name, one in total.items()}

    def complete(self, found: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Zeros for parameters that the loss never reached, if unused="zero".

        Raises:
            InputError: there are such parameters, and unused="error".
        """
        if self.unused == "error":
            refuse_unused([name for name in parameters if name not in found])
        return {n: found[n] if n in found else torch.zeros_like(p) for n, p in parameters.items()}


@dataclass(frozen=True, kw_only=True)
class CoupledCriterion(LossCriterion):
    """Base of those that let the user say which coupled weights count. Not a criterion of its own.

    Args:
        coupled: "all" weights that go with the unit; "out" the producing ones with their bias and norm; "in"
            those that consume the unit, which gives the derivative with respect to a gate on what is read.
            Groups that have none of the wanted kind count all.
    """

    coupled: Literal["all", "out", "in"] = "all"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        super().__post_init__()
        one_of("coupled", self.coupled, tuple(ROLES))

    def score(self, context: Context) -> dict[str, Tensor]:
        """As `Criterion.score`, of the weights that count."""
        self._check(context)
        groups = [focused(context.model, group, self.coupled) for group in context.groups]
        return super().score(replace(context, groups=groups))


def focused(model: nn.Module, group: Group, coupled: str) -> Group:
    """A group with the spans that count; all of them where the group has none of the wanted kind.

    Buffers that go with a unit (a table of positions) have no gradient and do not count, unless there is nothing else.
    """
    parameters = dict(model.named_parameters())
    every = [s for s in group.spans if counts(s.role, None)]
    trained = [s for s in every if s.tensor in parameters] or every
    return replace(group, spans=tuple([s for s in trained if counts(s.role, ROLES[coupled])] or trained))


def walk(context: Context) -> Iterator[tuple[Batch, int]]:
    """Every batch on the device of the model, with the number of its samples; reports progress."""
    data = context.data if context.data is not None else ()
    total = len(data) if isinstance(data, Sized) else 0
    for number, (batch, size) in enumerate(batches(context.model, data), start=1):
        yield batch, size
        if context.progress is not None:
            context.progress(number, max(total, number))


def backward(context: Context, batch: Batch, number: int) -> None:
    """Add the gradient of a batch's loss to those of the parameters that it depends on.

    Raises:
        InputError: the loss is not a scalar.
        NonFiniteError: it is NaN or Inf.
    """
    with exact_derivatives(context.model):
        loss = loss_of(context)(context.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError(
                f"the loss returned {describe(loss)}, not a scalar",
                hint="loss(model, batch) must return the mean over the samples as a tensor with one element",
            )
        require_finite_loss(loss, number)
        # Without a graph no parameter is reached, which is refused later, by the names of the parameters.
        if loss.requires_grad:
            loss.reshape(()).backward()  # type: ignore[no-untyped-call]


def loss_of(context: Context) -> Loss:
    """The user's loss, or the one for (input, target) batches."""
    return context.loss or default_loss


def accumulable(gradient: Tensor) -> Tensor:
    """Half precision becomes float32: squares below 2e-4 would vanish in it."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def require_finite_gradient(value: Tensor, name: str) -> None:
    """Refuse a gradient with NaN or Inf.

    Raises:
        NonFiniteError: names the parameter and the first index.
    """
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        index = tuple(torch.nonzero(~finite)[0].tolist())
        raise NonFiniteError(
            f"the gradient of {name!r} holds {value[index].item()} at index {index}",
            hint="look for a division by zero, a root of zero or an overflow in the model or in the loss",
        )


def unit_values(
    values: Mapping[str, Tensor], group: Group, roles: frozenset[str] | None, *, batch: bool = False
) -> Tensor:
    """Sum element values over every unit.

    Args:
        values: tensor name -> values of the tensor's shape, with a leading sample dimension if ``batch``.
        group: the units.
        roles: roles of the spans that count.
        batch: whether there is a sample dimension.

    Returns:
        float64 [units] or [samples, units]; for granularity element the values as they are, flattened.
    """
    lead = 1 if batch else 0
    spans = [s for s in group.spans if s.tensor in values and counts(s.role, roles)]
    if spans and spans[0].index is None:
        return values[spans[0].tensor].flatten(lead)
    samples = next(iter(values.values())).shape[:1] if batch else ()
    total = torch.zeros(*samples, group.size, dtype=torch.float64)
    for span in spans:
        assert span.index is not None
        value, index = values[span.tensor], span.index.cpu()
        # Dimensions that the index does not tell apart are summed first, so that it need not be expanded to all of
        # the weight.
        dims = [d + lead for d in range(index.dim()) if index.shape[d] == 1 and value.shape[d + lead] != 1]
        if dims:
            value = value.sum(dims, dtype=torch.float64, keepdim=True)
        # On the CPU: a GPU adds to one place in any order, and equal runs would rank differently.
        flat, unit = value.cpu().to(torch.float64).flatten(lead), index.flatten()
        owned = unit >= 0
        total.index_add_(lead, unit[owned], flat[..., owned])
    return total


def refuse_unused(names: Sequence[str]) -> None:
    """Refuse parameters that no loss reaches.

    Raises:
        InputError: there are any; the message names them.
    """
    if names:
        raise InputError(
            f"the loss does not depend on {listed(names)}",
            why="no batch gave these parameters a gradient",
            hint="protect them, do not detach the loss, or set unused='zero' if that is what they are worth",
        )


def everywhere_reached(
    data: Data | None, found: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What was found, with zeros for parameters that only other processes' batches have reached."""
    unreached = everywhere(data, [name for name in parameters if name not in found])
    missing = [name for name in parameters if name not in found and name not in unreached]
    return {**found, **{name: torch.zeros_like(parameters[name]) for name in missing}}


def warn_if_stationary(gradient: Mapping[str, Tensor], weights: Mapping[str, Tensor], groups: Sequence[Group]) -> None:
    """Warn where -g and w point the same way, as they do at the optimum of a weight-decayed loss.

    There g = -lambda w, so that -g w = lambda w^2 holds and first-order scores say what magnitude says.
    """
    names = {s.tensor for g in groups for s in g.spans if s.role in WEIGHTS and s.tensor in gradient}
    dot = sum((_dot(gradient[n], weights[n]) for n in sorted(names)), 0.0)
    size = _root(gradient, names) * _root(weights, names)
    if sum(weights[n].numel() for n in names) >= 3 and size > 0 and -dot / size > 0.95:
        warnings.warn(
            f"the gradient is nearly proportional to the weights (correlation of -g and w {-dot / size:.3f}): "
            "the model is at an optimum with weight decay, where first-order scores rank as magnitude; "
            "use reduce='per-sample' or a second-order criterion",
            StationaryWarning,
            stacklevel=2,
        )


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.to(torch.float64) * b.to(torch.float64)).sum())


def _root(values: Mapping[str, Tensor], names: set[str]) -> float:
    return float(sum((_dot(values[n], values[n]) for n in sorted(names)), 0.0) ** 0.5)
