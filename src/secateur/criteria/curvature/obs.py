"""Optimal Brain Surgeon: what the loss loses when the survivors make up for the weight that goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion, register
from secateur.criteria.curvature.diagonal import data_and_loss, mean_gradient
from secateur.criteria.sums import counts
from secateur.errors import RecipeError
from secateur.registry import one_of
from secateur.statistics.curvature.damping import DampingTrial, choose_damping
from secateur.statistics.curvature.hessian import hessian_blocks
from secateur.statistics.curvature.inverse import Blocks, Curvature, LowRank, gram
from secateur.statistics.gradients.functional import parameters
from secateur.statistics.gradients.gradient_rows import flatten, gradient_rows, unflatten
from secateur.statistics.notes import note
from secateur.types import Group

HELD_OUT = 128  # samples that automatic damping is judged on


@dataclass(frozen=True, eq=False)
class Surgery:
    """Inverse curvature of one model at one moment; scores and updates are read off it.

    Args:
        curvature: the damped inverse over all counted weights.
        names: the parameters, in the order of the flat vector.
        weights_d: their values (moved by the Newton step where the first-order term counts).
        constant: what the Newton step alone changes in the loss (0 without the first-order term).
        alive_d: False where the weight is exactly zero: it counts as pruned and stays zero.
        trials: how automatic damping came out, one entry per damping tried.
    """

    curvature: Curvature
    names: tuple[str, ...]
    weights_d: Tensor
    constant: float
    alive_d: Tensor
    trials: tuple[DampingTrial, ...] = ()

    @property
    def damping(self) -> float:
        """Damping on the diagonal, absolute."""
        return self.curvature.damping


@register
@dataclass(frozen=True, kw_only=True)
class OptimalBrainSurgeon(Criterion):
    """Rise of the loss after the best update of all other weights: w^2 / (2 [F^-1]_qq), and that update.

    The idea: if the others can take over what a weight did, its removal is cheap, whatever the diagonal says.
    The curvature is the empirical Fisher matrix of per-sample gradients plus damping; a set is worth
    w_Q^T ([F^-1]_QQ)^-1 w_Q / 2, which is not the sum over its members. `update` moves the survivors by the
    exact minimum for the whole removed set, and removed weights become exactly 0.0. A bad choice where there
    are far fewer gradients than directions that matter, where gradients vanish (the network fits its data),
    and for large steps in one go: one inverse holds only near the weights where it was taken, so take several steps
    (`Plan.then`) and score anew between them.

    Groups: the saliency of the unit as a set, over all its tensors ("low-rank"), or summed over blocks ("block").
    Scores are changes of one loss and compare across layers.

    A weight that is exactly zero counts as pruned: it scores 0, and updates leave it zero.

    Args:
        form: "low-rank": damping I + G^T G / N over all weights at once, by an N x N system; "block": dense
            blocks of consecutive weights of a tensor, no interaction between blocks (so the order of the
            weights matters).
        curvature: "fisher" (per-sample gradients), or "hessian", the true Hessian's blocks (form "block";
            one Hessian-vector product per weight and batch: small networks and tests).
        gradients: N, number of per-sample gradients, taken evenly over the data.
        block_size: weights per block.
        damping: relative to the mean of the curvature's diagonal. "auto" tries 1e-4, 1e-3, ... 10 and takes
            the one with the lowest loss on held-out samples after the removal of what it scores lowest (25
            and 50 % of the weights) with its own update. Large damping ranks as magnitude does.
        first_order: count the slope too (for a loss that is not at its minimum): scores and updates start
            from the Newton step.
        coupled: "all" counts every weight that goes with the unit, "out" only those that produce it. Counted
            weights are also those that an update moves.

    Raises:
        RecipeError: an unknown word, a number out of range, curvature "hessian" with form "low-rank".
        InputError: the matrix cannot be factorised, with damping up to 1000 times its mean diagonal.

    Warns:
        CurvatureWarning: damping had to be raised, or all gradients are zero.

    Cost:
        N backward passes, N^2 d operations, N d numbers ("low-rank"); d b^2 and d b ("block"). Automatic
        damping: 13 forward passes over the held-out samples, 6 inverses, 12 removals.

    Source:
        Hassibi, Stork 1992, equation 5; Singh, Alistarh, "WoodFisher", 2020, sections 3 and 4 (blocks, first
        order); Frantar, Kurtic, Alistarh, "M-FAC", 2021; Kurtic et al., "The Optimal BERT Surgeon", 2022,
        equation 4 (sets).
    """

    name: ClassVar[str] = "obs"
    summary: ClassVar[str] = "rise of the loss after the best update of the others: w^2 / (2 [F^-1]_qq)"
    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels", "gradients"})
    speed: ClassVar[str] = "medium to slow: seconds for the gradients, then algebra; memory for N gradients"
    best_for: ClassVar[str] = "one-shot pruning of elements without fine-tuning, with its weight update"
    comparable: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset({"permutation", "batch_split", "zero_lowest"})

    form: Literal["low-rank", "block"] = "low-rank"
    curvature: Literal["fisher", "hessian"] = "fisher"
    gradients: int = 256
    block_size: int = 64
    damping: float | Literal["auto"] = "auto"
    first_order: bool = False
    coupled: Literal["all", "out"] = "all"

    def __post_init__(self) -> None:
        """Refuse unknown words, numbers out of range and what does not go together."""
        one_of("form", self.form, ("low-rank", "block"))
        one_of("curvature", self.curvature, ("fisher", "hessian"))
        one_of("coupled", self.coupled, ("all", "out"))
        if self.curvature == "hessian" and self.form != "block":
            raise RecipeError("curvature='hessian' is made of blocks", hint="add form='block'")
        if min(self.gradients, self.block_size) < 1:
            raise RecipeError("gradients and block_size must be at least 1")
        if self.damping != "auto" and not self.damping >= (0.0 if self.form == "block" else 1e-12):
            raise RecipeError(
                f"damping={self.damping} is out of range",
                hint="give 'auto' or a positive number relative to the mean curvature, for example 1e-3",
            )

    @property
    def roles(self) -> frozenset[str] | None:
        """The producing weights, or all."""
        return frozenset({"out", "self"}) if self.coupled == "out" else None

    def fit(self, context: Context) -> Surgery:
        """Estimate the inverse curvature of the model as it is now.

        Args:
            context: as for `score`.

        Returns:
            What `score_units` and `update` read from; valid until the weights change.
        """
        context = self._admitted(context)
        with torch.inference_mode(False), self._guard(context):
            return self._fit(context)

    def update(
        self, context: Context, keep: Mapping[str, Tensor], *, surgery: Surgery | None = None
    ) -> dict[str, Tensor]:
        """The best new weights when some units go.

        Args:
            context: the model is not changed.
            keep: group name -> bool tensor of the group's shape, True = keep.
            surgery: from `fit`, where it is at hand; else the inverse is estimated here.

        Returns:
            Parameter name -> new values of the parameter's dtype; removed weights are exactly 0.0.
        """
        surgery = surgery or self.fit(context)
        keep_d = surgery.alive_d.clone()
        start = _starts(context, surgery.names)
        for group in context.groups:
            coordinates, unit = _coordinates(group, start, surgery.weights_d.device, self.roles)
            gone = ~keep[group.name].flatten().to(unit.device)
            keep_d[coordinates[gone[unit]]] = False
        weights_d, _ = surgery.curvature.remove(surgery.weights_d, keep_d)
        new = unflatten(weights_d, context.model, surgery.names)
        # -0.0 becomes 0.0, so that what is removed has the same bits everywhere.
        return {name: tensor + 0.0 for name, tensor in new.items()}

    def score_units(self, context: Context, surgery: Surgery) -> dict[str, Tensor]:
        """Saliency of every unit from an inverse that is at hand: group name -> float64 tensor."""
        start = _starts(context, surgery.names)
        diagonal: Tensor | None = None
        found = {}
        for group in context.groups:
            coordinates, unit = _coordinates(group, start, surgery.weights_d.device, self.roles)
            # One weight per unit: the diagonal says it all, and no systems have to be solved.
            if len(coordinates) == group.size == len(torch.unique(unit)):
                diagonal = surgery.curvature.inverse_diagonal() if diagonal is None else diagonal
                values = torch.zeros(group.size, dtype=torch.float64, device=unit.device)
                values[unit] = (surgery.weights_d.to(torch.float64).square() / (2 * diagonal))[coordinates]
            else:
                values = surgery.curvature.saliency(surgery.weights_d, coordinates, unit, group.size)
            found[group.name] = values.view(group.shape) + surgery.constant
        return found

    def _score(self, context: Context) -> dict[str, Tensor]:
        return self.score_units(context, self._fit(context))

    def _fit(self, context: Context) -> Surgery:
        data, loss = data_and_loss(context, "OBS")
        model = context.model
        names = list(self.weights(context))
        weights_d = flatten(parameters(model, names), names)
        alive_d = weights_d != 0
        automatic = self.damping == "auto"
        # Judged on the samples that the curvature was made of, the least damping would look best.
        held = HELD_OUT if automatic else 0
        found = gradient_rows(
            model,
            loss,
            data,
            names,
            rows=self.gradients if self.curvature == "fisher" else 1,
            held=held,
        )
        # In place, as nothing here is larger. What is zero counts as pruned: its slope must not move the others.
        rows_Nd = found.rows_Nd.mul_(alive_d)
        builder, mean = self._builder(context, names, rows_Nd, alive_d)
        if mean == 0.0:
            note("obs: the curvature is zero; with damping alone the order is that of magnitude")
            mean = 1.0
        trials: tuple[DampingTrial, ...] = ()
        if self.damping == "auto":
            kept = found.held_out or ((next(iter(data)), 1),)
            chosen, trials = choose_damping(builder, mean, weights_d, alive_d, model, loss, names, kept)
        else:
            chosen = self.damping
        curvature = builder(chosen * mean)
        constant = 0.0
        if self.first_order:
            slope = flatten(mean_gradient(context, names), names) * alive_d
            step = curvature.solve(slope) * alive_d
            constant = -float(slope @ step) / 2
            weights_d = weights_d.to(torch.float64) - step
        return Surgery(curvature, tuple(names), weights_d, constant, alive_d, trials)

    def _builder(
        self, context: Context, names: list[str], rows_Nd: Tensor, alive_d: Tensor
    ) -> tuple[Callable[[float], Curvature], float]:
        """From an absolute damping to the inverse, and the mean curvature of the weights that are alive."""
        alive = max(int(alive_d.sum()), 1)
        if self.form == "low-rank":
            gram_NN = gram(rows_Nd)
            return (
                lambda damping: LowRank(rows_Nd, damping, gram_NN),
                float(gram_NN.trace()) / (len(rows_Nd) * alive),
            )
        if self.curvature == "hessian":
            blocks = self._hessian_blocks(context, names, alive_d)
        else:
            parts = _blocks(context, names, self.block_size)
            blocks = [_square(rows_Nd[:, s]) for s in parts]
        mean = sum(float(block.diagonal().sum()) for block in blocks) / alive
        return lambda damping: Blocks(blocks, damping), mean

    def _hessian_blocks(self, context: Context, names: list[str], alive_d: Tensor) -> list[Tensor]:
        data, loss = data_and_loss(context, "OBS")
        held = parameters(context.model, names)
        wanted = []
        for name, tensor in held.items():
            every = torch.arange(tensor.numel(), device=tensor.device)
            wanted += [(name, index) for index in torch.split(every, self.block_size)]
        blocks = hessian_blocks(context.model, loss, data, wanted)
        live = torch.split(alive_d.to(torch.float64), [len(block) for block in blocks])
        # A pruned weight gets a unit row: it neither moves nor lets others move for it.
        return [b * m[:, None] * m + torch.diag(1 - m) for b, m in zip(blocks, live, strict=True)]


def _square(rows_Nb: Tensor) -> Tensor:
    rows = rows_Nb.to(torch.float64)
    return rows.T @ rows / len(rows)


def _blocks(context: Context, names: list[str], size: int) -> list[slice]:
    found, start = [], 0
    for tensor in parameters(context.model, names).values():
        stop = start + tensor.numel()
        found += [slice(a, min(a + size, stop)) for a in range(start, stop, size)]
        start = stop
    return found


def _starts(context: Context, names: tuple[str, ...]) -> dict[str, tuple[int, torch.Size]]:
    found, start = {}, 0
    for name, tensor in parameters(context.model, names).items():
        found[name] = (start, tensor.shape)
        start += tensor.numel()
    return found


def _coordinates(
    group: Group,
    start: Mapping[str, tuple[int, torch.Size]],
    device: torch.device,
    roles: frozenset[str] | None,
) -> tuple[Tensor, Tensor]:
    """Positions in the flat vector that belong to a unit, and the unit's number, each pair once."""
    coordinates, units = [], []
    for span in group.spans:
        if not counts(span.role, roles) or span.tensor not in start:
            continue
        first, shape = start[span.tensor]
        place = torch.arange(first, first + shape.numel(), device=device)
        unit = place - first if span.index is None else span.index.to(device).expand(shape).flatten()
        coordinates.append(place[unit >= 0])
        units.append(unit[unit >= 0])
    pairs = torch.stack([torch.cat(units), torch.cat(coordinates)])
    if len(units) > 1:
        # Two spans of a unit may hold one element, which counts once.
        pairs = torch.unique(pairs, dim=1)
    return pairs[1], pairs[0]
