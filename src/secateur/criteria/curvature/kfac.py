"""K-FAC: second-order saliency of whole units from two small matrices per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion, register
from secateur.criteria.curvature.diagonal import data_and_loss
from secateur.criteria.forecast import EpochForecast, outputs
from secateur.criteria.sums import counts
from secateur.errors import RecipeError, UnsupportedError
from secateur.model.share import Share
from secateur.registry import one_of
from secateur.statistics.curvature.damping import FRACTIONS, GRID
from secateur.statistics.curvature.inverse import damped_cholesky
from secateur.statistics.curvature.kronecker import Factors, kronecker_factors, require_room_for_factors
from secateur.statistics.gradients.functional import CountedBatch, mean_loss, set_aside
from secateur.statistics.notes import note
from secateur.types import Group, Loss

HELD_OUT = 128  # samples that automatic damping is judged on
DENSE_LIMIT = 4096  # weights of a unit that is no product of rows and columns


@register
@dataclass(frozen=True, kw_only=True)
class KroneckerCurvature(Criterion):
    """Rise of the loss from Kronecker-factored curvature: weights of a unit act together, layers do not.

    The idea: the curvature of a layer is close to A (x) S, input second moments times slope second moments.
    That is small enough to keep whole, so a filter, a head or a block gets its full quadratic form
    w_u^T (A (x) S)_uu w_u / 2, with all terms between its weights, at the price of two small matrices. For one
    linear layer under a squared error it is exact. A bad choice where inputs and slopes are dependent (batch
    norm in train mode; scoring is in eval mode) or interaction between layers decides.

    Groups: the quadratic form of the unit in every layer, summed over the layers. Weights and biases of Linear,
    Conv1d and Conv2d layers count; scales and shifts of norms do not (they have no such factors). Scores keep
    the scale of the loss ("expand" convention: S sums over positions) and compare across layers.

    Args:
        form: "obd" the quadratic form; "obs" w_u^T ([F^-1]_uu)^-1 w_u / 2, after the best update of the rest
            of the layer; "ekfac" the quadratic form with the curvature measured anew along the
            eigenvectors of A and S (EigenDamage's rotated importance, put back on the original weights).
        slopes: "exact" all columns of the loss's Hessian in the outputs, "sampled" one random sum of them
            per sample, "data" the slopes of the loss (empirical Fisher).
        damping: for "obs": both factors get sqrt(damping) times the mean of their own diagonal. "auto" tries 1e-4,
            1e-3, ... 10 and takes the one whose removals, of the 25 and 50 % of the units that it scores lowest, cost
            least on samples held out (at most 128, and a fifth of the data).
        coupled: "all" counts every weight that goes with the unit, "out" only those that produce it.

    Raises:
        RecipeError: unknown word, damping not positive, a tensor of another kind of layer.
        UnsupportedError: a layer is called more than once, or not with the samples first.

    Warns:
        CurvatureWarning: damping had to be raised.

    Cost:
        One forward pass and as many backward passes as outputs ("sampled", "data": one); twice that for
        "ekfac". Then one small product per unit and layer. Automatic damping: six of these, and thirteen forward
        passes over the samples held out.

    Source:
        Martens, Grosse 2015; Grosse, Martens 2016 (convolutions); Wang, Grosse, Fidler, Zhang, "EigenDamage",
        2019, equations 4 to 8 (Kron-OBD, Kron-OBS); George et al. 2018 (corrected eigenvalues).

    Example:
        One linear layer, half squared error: A is the second moment of the inputs, S is 1.

        >>> from secateur.types import Span
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean() / 2
        >>> groups = [Group("row", "vector", (1,), (Span("weight", torch.tensor([[0]]), "self"),))]
        >>> data = [(torch.tensor([[1.0, 2.0], [1.0, 4.0]]), torch.zeros(2, 1))]
        >>> KroneckerCurvature().score(Context(layer, groups, data=data, loss=loss))["row"]
        tensor([18.5000])
    """

    name: ClassVar[str] = "kfac"
    summary: ClassVar[str] = "rise of the loss for whole units from Kronecker-factored curvature"
    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels", "gradients"})
    speed: ClassVar[str] = "slow: about one epoch per output; slopes='sampled' or 'data': five"
    best_for: ClassVar[str] = "filters, neurons and heads, whose weights act together"
    comparable: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})

    form: Literal["obd", "obs", "ekfac"] = "obd"
    slopes: Literal["exact", "sampled", "data"] = "exact"
    damping: float | Literal["auto"] = "auto"
    coupled: Literal["all", "out"] = "all"

    def __post_init__(self) -> None:
        """Refuse unknown words and numbers out of range."""
        one_of("form", self.form, ("obd", "obs", "ekfac"))
        one_of("slopes", self.slopes, ("exact", "sampled", "data"))
        one_of("coupled", self.coupled, ("all", "out"))
        if self.damping != "auto" and not self.damping > 0:
            raise RecipeError(f"damping={self.damping} is out of range", hint="give 'auto' or a positive number")

    @property
    def roles(self) -> frozenset[str] | None:
        """The producing weights, or all."""
        return frozenset({"out", "self"}) if self.coupled == "out" else None

    def forecast(self, context: Context) -> EpochForecast | None:
        """Epochs by the number of outputs."""
        data_and_loss(context, "K-FAC")
        require_room_for_factors(context.model, self.weights(context))  # before the outputs, for which the model is run
        count = outputs(context) if self.slopes == "exact" else 5
        if count is None:
            return None
        twice = 2 if self.form == "ekfac" else 1
        why = f"one backward pass for each of {count} outputs" if self.slopes == "exact" else f"slopes {self.slopes}"
        return EpochForecast(
            float(twice * count), why + (", twice" if twice == 2 else ""), 'take slopes="sampled" or "data"'
        )

    def factors(self, context: Context) -> dict[str, Factors]:
        """Curvature factors of the layers: name of the weight -> factors (model in eval mode)."""
        data, loss = data_and_loss(context, "K-FAC")
        weights = self.weights(context)
        found = kronecker_factors(
            context.model,
            loss,
            data,
            weights,
            slopes=self.slopes,
            spectrum=self.form == "ekfac",
            seed=context.seed,
            progress=context.progress,
        )
        other = [name for name, w in weights.items() if w.dim() > 1 and name not in found]
        if other:
            raise RecipeError(
                f"kfac knows Linear, Conv1d and Conv2d layers; not the one of {other[0]!r}",
                hint="use criterion fisher, gauss-newton or obd, or leave the layer out",
            )
        return found

    def _score(self, context: Context) -> dict[str, Tensor]:
        if self.form != "obs" or self.damping != "auto":
            return self._scores(context, self.factors(context), 1.0 if self.damping == "auto" else self.damping)
        data, loss = data_and_loss(context, "K-FAC")
        if isinstance(data, Share):
            raise UnsupportedError(
                "damping='auto' tries its choice on samples of one process", hint="give a number, for example 1e-3"
            )
        rest, kept = set_aside(context.model, data, HELD_OUT)
        factors = self.factors(replace(context, data=rest))
        if not kept:
            note("kfac: too few samples to choose the damping by; 1e-3 is taken")
            return self._scores(context, factors, 1e-3)
        tried = {damping: self._scores(context, factors, damping) for damping in GRID}
        costs = {damping: self._cost(context, scores, loss, kept) for damping, scores in tried.items()}
        # From the largest: of equals the strongest damping, which trusts the curvature least.
        return tried[min(reversed(GRID), key=costs.__getitem__)]

    def _scores(self, context: Context, factors: Mapping[str, Factors], damping: float) -> dict[str, Tensor]:
        weights = self.weights(context)
        layers = [_Layer(f, weights, self.form, damping) for f in factors.values()]
        return {group.name: self._of_group(group, layers) for group in context.groups}

    def _cost(self, context: Context, scores: Mapping[str, Tensor], loss: Loss, kept: Sequence[CountedBatch]) -> float:
        """Loss on the samples held out without the units that score lowest, over all groups; summed."""
        worth, total = torch.cat([scores[g.name].flatten() for g in context.groups]), 0.0
        order = torch.argsort(worth, stable=True)
        for fraction in FRACTIONS:
            gone = torch.zeros(len(worth), dtype=torch.bool)
            gone[order[: round(fraction * len(worth))]] = True
            parts = torch.split(gone, [g.size for g in context.groups])
            found = mean_loss(context.model, loss, kept, self._without(context, parts))
            total += found if found == found else float("inf")  # NaN compares with nothing, and would win by place
        return total

    def _without(self, context: Context, gone: Sequence[Tensor]) -> dict[str, Tensor]:
        """The counted weights with some units of every group at zero."""
        weights = self.weights(context)
        for group, flags in zip(context.groups, gone, strict=True):
            for span in group.spans:
                if counts(span.role, self.roles):
                    w = weights[span.tensor]
                    unit = span.units(w)
                    removed = flags.to(unit.device)[unit.clamp(min=0)] & (unit >= 0)
                    weights[span.tensor] = torch.where(removed, torch.zeros_like(w), w)
        return weights

    def _of_group(self, group: Group, layers: list[_Layer]) -> Tensor:
        total = torch.zeros(group.size, dtype=torch.float64)
        for layer in layers:
            pairs = layer.pairs(group, self.roles)
            if len(pairs):
                layer.add(total, pairs)
        return total.view(group.shape)


class _Layer:
    """One layer's weights as a matrix, its curvature, and saliencies of parts of it."""

    def __init__(self, factors: Factors, weights: Mapping[str, Tensor], form: str, damping: float) -> None:
        self.form, self.factors = form, factors
        self.w_GOJ = factors.matrix(dict(weights))
        self.shapes = {name: w.shape for name, w in weights.items()}
        self.a, self.s = factors.a_GJJ, factors.s_GOO
        if self.form == "obs":
            self.a, self.a_inverse = _damped_inverse(self.a, damping, f"input factor of {factors.weight}")
            self.s, self.s_inverse = _damped_inverse(self.s, damping, f"output factor of {factors.weight}")
        if self.form == "ekfac":
            self.qa, self.qs = factors.eigenvectors()

    def pairs(self, group: Group, roles: frozenset[str] | None) -> Tensor:
        """(unit, flat position in w_GOJ) of all counted weights of a group in this layer: [n, 2], sorted."""
        wide, bias = self.w_GOJ.shape[2], bool(self.factors.bias)
        shape = (*self.w_GOJ.shape[:2], wide - bias)
        found = []
        for span in group.spans:
            if span.tensor not in (self.factors.weight, self.factors.bias) or not counts(span.role, roles):
                continue
            place = torch.arange(self.w_GOJ.numel()).view(self.w_GOJ.shape)
            place = place[..., -1] if span.tensor == self.factors.bias else place[..., : shape[2]]
            if span.index is None:
                unit = torch.arange(place.numel())
            else:
                unit = span.index.cpu().expand(self.shapes[span.tensor]).flatten()
            found.append(torch.stack([unit, place.flatten()], 1)[unit >= 0])
        # Sorted by unit; an element that lies in two spans of a unit counts once.
        return torch.unique(torch.cat(found), dim=0) if found else torch.zeros(0, 2, dtype=torch.long)

    def add(self, total: Tensor, pairs: Tensor) -> None:
        """Add every unit's saliency in this layer."""
        units, sizes = torch.unique_consecutive(pairs[:, 0], return_counts=True)
        if int(sizes.max()) == 1:  # single weights: all at once, where a loop would take a step for each
            total[units] += self.elements().flatten().cpu()[pairs[:, 1]]
            return
        for unit, place in zip(units.tolist(), torch.split(pairs[:, 1], sizes.tolist()), strict=True):
            total[unit] += self.unit(place.to(self.w_GOJ.device))

    def elements(self) -> Tensor:
        """Saliency of every single weight, [G, O, J]."""
        if self.form == "ekfac" and self.factors.spectrum_GOJ is not None:
            curvature = self.qs.square() @ self.factors.spectrum_GOJ @ self.qa.square().mT
        elif self.form == "obs":
            rows, columns = _diagonal(self.s_inverse), _diagonal(self.a_inverse)
            curvature = 1 / (rows[:, :, None] * columns[:, None, :])
        else:
            curvature = _diagonal(self.s)[:, :, None] * _diagonal(self.a)[:, None, :]
        return self.w_GOJ.square() * curvature / 2

    def unit(self, place: Tensor) -> float:
        """Saliency of a set of weights, given by flat positions: the sum over the groups of the layer."""
        rows, wide = self.w_GOJ.shape[1:]
        total = 0.0
        group = place // (rows * wide)
        for g in torch.unique(group).tolist():
            inside = place[group == g] - g * rows * wide
            r, c = torch.unique(inside // wide), torch.unique(inside % wide)
            part = torch.zeros(rows * wide, dtype=torch.float64, device=place.device)
            part[inside] = self.w_GOJ[g].flatten()[inside]
            matrix = part.view(rows, wide)[r][:, c]
            # A Kronecker product restricted to rows times columns is one again; to a scattered set it is not.
            if self.form == "obs" and len(inside) != len(r) * len(c):
                total += self._dense(g, inside)
            elif self.form == "ekfac" and self.factors.spectrum_GOJ is not None:
                rotated = self.qs[g][r].T @ matrix @ self.qa[g][c]
                total += float((rotated.square() * self.factors.spectrum_GOJ[g]).sum()) / 2
            else:
                total += float((matrix * (self._rows(g, r) @ matrix @ self._columns(g, c))).sum()) / 2
        return total

    def _rows(self, g: int, r: Tensor) -> Tensor:
        return _part(self.s[g], r, self.s_inverse[g] if self.form == "obs" else None)

    def _columns(self, g: int, c: Tensor) -> Tensor:
        return _part(self.a[g], c, self.a_inverse[g] if self.form == "obs" else None)

    def _dense(self, g: int, inside: Tensor) -> float:
        """Inverse curvature of a set that is no product of rows and columns, written out."""
        if len(inside) > DENSE_LIMIT:
            raise RecipeError(
                f"kfac form='obs': a unit of {len(inside)} scattered weights in {self.factors.weight!r}",
                hint="use form='obd', which has no such limit",
            )
        r, c = inside // self.w_GOJ.shape[2], inside % self.w_GOJ.shape[2]
        inverse = self.s_inverse[g][r][:, r] * self.a_inverse[g][c][:, c]
        w = self.w_GOJ[g].flatten()[inside]
        return float(w @ torch.linalg.solve(inverse, w)) / 2


def _part(matrix: Tensor, index: Tensor, inverse: Tensor | None) -> Tensor:
    """The block of a factor, or the inverse of the block of its inverse; the whole factor is both."""
    if len(index) == len(matrix):
        return matrix
    if inverse is None:
        return matrix[index][:, index]
    found: Tensor = torch.linalg.inv(inverse[index][:, index])
    return found


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def _damped_inverse(factor: Tensor, damping: float, what: str) -> tuple[Tensor, Tensor]:
    """The factor with damping, and its inverse."""
    size = float(_diagonal(factor).mean()) or 1.0
    # The root in either factor: their product is then damped as much as was asked for.
    lower, used = damped_cholesky(factor, damping**0.5 * size, what)
    damped = factor + used * torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return damped, torch.cholesky_inverse(lower)
