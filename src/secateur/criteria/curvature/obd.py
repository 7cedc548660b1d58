"""Optimal Brain Damage: the true Hessian diagonal times the squared weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, register
from secateur.criteria.curvature.diagonal import DiagonalCriterion, data_and_loss, mean_gradient
from secateur.criteria.forecast import EpochForecast, outputs
from secateur.criteria.sums import counts, reduce_spans
from secateur.errors import RecipeError
from secateur.registry import one_of
from secateur.statistics.curvature.gauss_newton_matrix import gauss_newton_diagonal, same_layer_exact
from secateur.statistics.curvature.hessian import Diagonal, exact_diagonal, hutchinson_diagonal, quadratic_forms
from secateur.statistics.curvature.output_curvature import output_width
from secateur.statistics.gradients.functional import Tensors, batches, parameters
from secateur.statistics.notes import note
from secateur.types import Group

AUTO_OUTPUTS = 256  # outputs per sample up to which auto prefers the exact Gauss-Newton route
NOISE = 0.5  # relative standard error of a sampled diagonal above which it is said aloud


@register
@dataclass(frozen=True, kw_only=True)
class OptimalBrainDamage(DiagonalCriterion):
    """Rise of the loss when a weight is set to zero, from the true diagonal of its Hessian: h w^2 / 2.

    The idea: near a minimum the loss is a bowl, and the weight that matters least is the one whose removal
    climbs least, small or not: w = 0.5 under curvature 0.1 costs 0.0125, w = 0.3 under curvature 2 costs
    0.09, so the larger weight goes. The Hessian is the real one (double backward), no Fisher in its place. A
    bad choice far from a minimum (the slope counts there: `first_order`), for removing so much at once that
    the bowl ends, and where weights act together: the diagonal ignores that, `joint` or criterion "obs" do not.

    Groups: the sum over the weights of the unit (off-diagonal terms left out); with `joint` the whole
    quadratic form w_u^T H_uu w_u / 2, exact to second order for removing the unit alone. Scores are changes
    of the same loss, so they compare across layers as they are.

    Args:
        method: how the diagonal is found. "exact": one Hessian-vector product per weight. "gauss-newton":
            the outputs' curvature pulled back sample by sample. "hutchinson": random signs, with error bars.
            "auto": Gauss-Newton for every tensor whose own Hessian block equals the Gauss-Newton block on
            the first batch (tried with a random vector: so it is for ReLU, max pooling and eval batch norm)
            with up to 256 outputs per sample; the other tensors by "exact" up to `exact_limit` weights, else
            by "hutchinson". `diagonal` tells which were used.
        joint: score groups by the exact quadratic form, one product per unit and batch; `method` is then
            not used.
        first_order: add the term -g w of a loss that is not at its minimum.
        negative: what becomes of a negative score, which says that the loss will fall. "keep" ranks it
            first for removal, as the mathematics does; "clip" makes it 0; "abs" distrusts large curvature
            of either sign.
        probes: sign vectors per batch for "hutchinson", at least 2.
        exact_limit: number of weights up to which "auto" uses "exact".
        unit_limit: number of units up to which `joint` works.
        coupled: see `DiagonalCriterion`.

    Raises:
        RecipeError: unknown word, a number out of range, or more units than `unit_limit` with `joint`.

    Cost:
        exact: weights x batches Hessian-vector products (each about three backward passes); gauss-newton:
        outputs x samples backward passes; hutchinson: probes x batches products; joint: units x batches.

    Source:
        LeCun, Denker, Solla, "Optimal Brain Damage", 1989, equations 3 to 5.

    Example:
        >>> from secateur.types import Group, Span
        >>> class Bowl(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = torch.nn.Parameter(torch.tensor([0.5, 0.3]))
        >>> h = torch.tensor([0.1, 2.0])
        >>> def loss(model, batch):
        ...     return (h * (model.w - batch).square()).sum() / 2
        >>> groups = [Group("w", "element", (2,), (Span("w", None, "self"),))]
        >>> context = Context(Bowl(), groups, data=[torch.tensor([[0.5, 0.3]])], loss=loss)
        >>> OptimalBrainDamage().score(context)["w"]
        tensor([0.0125, 0.0900])
    """

    name: ClassVar[str] = "obd"
    summary: ClassVar[str] = "rise of the loss from the true Hessian diagonal: h w^2 / 2"
    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels", "gradients"})
    speed: ClassVar[str] = "slow: 1.5 epochs per output for ReLU nets; else 2.5 per probe"
    best_for: ClassVar[str] = "trained networks, labels at hand, little or no fine-tuning afterwards"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split"})

    method: Literal["auto", "exact", "gauss-newton", "hutchinson"] = "auto"
    joint: bool = False
    first_order: bool = False
    negative: Literal["keep", "clip", "abs"] = "keep"
    probes: int = 16
    exact_limit: int = 10_000
    unit_limit: int = 4096

    def __post_init__(self) -> None:
        """Refuse unknown words and numbers out of range."""
        super().__post_init__()
        one_of("method", self.method, ("auto", "exact", "gauss-newton", "hutchinson"))
        one_of("negative", self.negative, ("keep", "clip", "abs"))
        if self.probes < 2:
            raise RecipeError(f"probes={self.probes} is too few", hint="error bars need at least 2")

    def forecast(self, context: Context) -> EpochForecast | None:
        """Epochs by what each tensor's curvature is found with."""
        data_and_loss(context, "a second-order criterion")
        if self.joint:
            units = sum(group.size for group in context.groups)
            return EpochForecast(
                3.0 * units, f"one product with the Hessian for each of {units} units", "take joint=False"
            )
        names = list(self.weights(context))
        epochs, why = 0.0, []
        for method, some in (self._ways(context, names) if self.method == "auto" else {self.method: names}).items():
            if method == "hutchinson":
                epochs, of = epochs + 2.5 * self.probes, f"{self.probes} probes"
            elif method == "exact":
                count = sum(tensor.numel() for tensor in parameters(context.model, some).values())
                epochs, of = epochs + 3.0 * count, f"each of {count} weights"
            else:
                width = outputs(context)
                epochs, of = epochs + 1.5 * (width or 0), f"each of {width} outputs"
            why.append(f"{method}: passes for {of}")
        less = 'take fewer probes, criterion gauss-newton with draws=1, kfac with slopes="sampled", or fisher'
        return EpochForecast(epochs, ", ".join(why), less)

    def finish(self, values: Tensor) -> Tensor:
        """Treat negative scores as asked."""
        if self.negative == "clip":
            return values.clamp(min=0)
        return values.abs() if self.negative == "abs" else values

    def contributions(self, context: Context) -> dict[str, Tensor]:
        """Half h w squared, and minus g w where asked."""
        found = super().contributions(context)
        return _add(found, self._slope_term(context)) if self.first_order else found

    def _slope_term(self, context: Context) -> Tensors:
        weights = self.weights(context)
        gradient = mean_gradient(context, list(weights))
        return {name: -gradient[name] * w.to(torch.float64) for name, w in weights.items()}

    def _score(self, context: Context) -> dict[str, Tensor]:
        if not self.joint:
            return super()._score(context)
        slope = self._slope_term(context) if self.first_order else None
        return {group.name: self.finish(self._quadratic(context, group, slope)) for group in context.groups}

    def _quadratic(self, context: Context, group: Group, slope: Tensors | None) -> Tensor:
        """``w_u^T H_uu w_u / 2`` of every unit; the unit's weights in all tensors go into one vector."""
        if group.size > self.unit_limit:
            raise RecipeError(
                f"joint=True: group {group.name!r} has {group.size} units, more than {self.unit_limit}",
                hint="use joint=False, or raise unit_limit: one Hessian-vector product per unit and batch",
            )
        data, loss = data_and_loss(context, "joint OBD")
        weights = {s.tensor: None for s in group.spans if counts(s.role, self.roles)}
        held = parameters(context.model, weights)

        def of_unit(number: int) -> Tensors:
            return unit_weights(group, number, held, self.roles)

        forms = quadratic_forms(
            context.model, loss, data, of_unit, group.size, names=list(held), progress=context.progress
        )
        score = forms.view(group.shape) / 2
        if slope is not None:
            score = score + reduce_spans(slope, group, "sum", roles=self.roles).cpu()
        return score

    def _diagonal(self, context: Context, names: list[str]) -> Diagonal:
        data, loss = data_and_loss(context, "a second-order criterion")
        model, progress = context.model, context.progress
        ways = self._ways(context, names) if self.method == "auto" else {self.method: names}
        parts = []
        for method, some in ways.items():
            if method == "exact":
                parts.append(exact_diagonal(model, loss, data, some, progress=progress))
            elif method == "gauss-newton":
                parts.append(gauss_newton_diagonal(model, loss, data, some, progress=progress))
            else:
                parts.append(
                    hutchinson_diagonal(
                        model, loss, data, some, probes=self.probes, seed=context.seed, progress=progress
                    )
                )
        found = merge(parts)
        if found.relative_error > NOISE:
            note(
                f"obd: the sampled Hessian diagonal has a relative standard error of "
                f"{found.relative_error:.2f} with {self.probes} probes; take more probes or more data"
            )
        return found

    def _ways(self, context: Context, names: list[str]) -> dict[str, list[str]]:
        """Which method finds which tensors, for method "auto"."""
        data, loss = data_and_loss(context, "a second-order criterion")
        batch, _ = next(batches(context.model, data))
        shortcut: frozenset[str] = frozenset()
        if output_width(context.model, loss, batch) <= AUTO_OUTPUTS:
            shortcut = same_layer_exact(context.model, loss, batch, names, seed=context.seed)
        rest = [name for name in names if name not in shortcut]
        size = sum(tensor.numel() for tensor in parameters(context.model, rest).values())
        # An exact diagonal takes a product per weight, so only what is small can have one.
        otherwise = "exact" if size <= self.exact_limit else "hutchinson"
        ways = {"gauss-newton": [name for name in names if name in shortcut], otherwise: rest}
        return {method: some for method, some in ways.items() if some}


def unit_weights(group: Group, number: int, held: Tensors, roles: frozenset[str] | None) -> Tensors:
    """The weights of one unit, zero elsewhere: parameter name -> tensor of the parameter's shape."""
    found: Tensors = {}
    for span in group.spans:
        if not counts(span.role, roles):
            continue
        tensor = held[span.tensor]
        mine = (span.units(tensor) == number).expand(tensor.shape)
        before = found.get(span.tensor, torch.zeros_like(tensor))
        found[span.tensor] = torch.where(mine, tensor, before)
    return found


def merge(parts: list[Diagonal]) -> Diagonal:
    """Diagonals of different parameters as one."""
    values: Tensors = {}
    method: dict[str, str] = {}
    error: Tensors = {}
    for part in parts:
        values.update(part.values)
        method.update(part.method)
        error.update(part.error)
    return Diagonal(values, method, error, max(p.samples for p in parts), max(p.probes for p in parts))


def _add(a: Tensors, b: Tensors) -> Tensors:
    return {name: tensor + b[name] for name, tensor in a.items()}
