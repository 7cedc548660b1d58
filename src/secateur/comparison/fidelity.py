"""Does a score tell what the loss will do? Sampled units are left out one by one, and the loss is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import Tensor, nn

from secateur.comparison.records import FidelityLine, ScoreFidelity
from secateur.comparison.significance import spearman
from secateur.errors import InputError
from secateur.model.call import default_loss, device_of, to_device, to_example
from secateur.model.guard import guard
from secateur.model.samples import batch_size_of
from secateur.statistics.gradients.functional import mean_loss, parameters
from secateur.structure.left_out import left_out, units_of
from secateur.types import Batch, Group, Loss

Picks = dict[str, list[int]]
FEWEST = 4  # units of a layer whose order says anything


def pick(groups: Sequence[Group], count: int, seed: int) -> Picks:
    """About `count` units, as many from every group, at random; all of a group that has fewer.

    Args:
        groups: the units.
        count: how many in all; with more groups than that, some groups give none.
        seed: of the choice.

    Returns:
        Group name -> unit numbers in ascending order; layers that may not go are not among them.
    """
    # Its own generator: all criteria, and a comparison that goes on, must be asked about the same units.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(groups), generator=generator)[:count].sort().values.tolist()
    each = max(1, count // max(1, len(order)))
    found = {}
    for group in (groups[place] for place in order):
        free = group.attributes.get("free")
        units = torch.arange(group.size) if free is None else torch.tensor(free).nonzero().flatten()
        chosen = torch.randperm(len(units), generator=generator)[:each]
        found[group.name] = units[chosen].sort().values.tolist()
    return found


def loss_changes(
    model: nn.Module, groups: Sequence[Group], picks: Picks, batches: Sequence[Batch], loss: Loss | None
) -> dict[str, Tensor] | None:
    """Rise of the mean loss without one unit: a whole layer is left out, others are zero wherever they live.

    Args:
        model: in eval mode meanwhile; its weights are swapped, never written to.
        groups: the units.
        picks: which of them.
        batches: what was scored with.
        loss: ``loss(model, batch) -> scalar``; default from the batches.

    Returns:
        Group name -> float64 [picked units]; None where the batches have no target and no loss was given.

    Cost: one forward pass over the batches per unit.
    """
    loss_of, device = loss or default_loss, device_of(model)
    kept = [(to_device(batch, device), batch_size_of(to_example(batch))) for batch in batches]
    with guard(model, mode="eval", gradients=False, seed=0):
        try:
            whole = mean_loss(model, loss_of, kept, {})
        except InputError:
            return None
        found = {}
        for group in groups:
            changes = []
            for unit in picks.get(group.name, []):
                # A block of zeros is no missing block: behind a norm it silences the path around it as well.
                gone = [units_of(group)[unit]] if group.granularity in ("layer", "sub_block") else []
                with left_out(model, gone):
                    changes.append(
                        mean_loss(model, loss_of, kept, {} if gone else _without(model, group, unit)) - whole
                    )
            found[group.name] = torch.tensor(changes, dtype=torch.float64)
    return found


def _without(model: nn.Module, group: Group, unit: int) -> dict[str, Tensor]:
    """The parameters of a unit, with the unit at zero."""
    spans = [span for span in group.spans if span.role != "state"]
    known = parameters(model, [span.tensor for span in spans])
    for span in spans:
        value = known[span.tensor]
        known[span.tensor] = torch.where(span.units(value) == unit, torch.zeros_like(value), value)
    return known


def score_fidelity(scores: Mapping[str, Tensor], picks: Picks, truth: Mapping[str, Tensor]) -> ScoreFidelity:
    """Spearman's rank correlation of scores with the measured changes.

    Returns:
        ``all``: over all picked units, which a criterion needs that lets layers compete; ``within``: mean over the
        layers, which is what it needs where every layer loses as much. None where nothing can be said.
    """
    chosen = {name: scores[name].flatten()[units].double().tolist() for name, units in picks.items()}
    # A layer of equal scores has no order, and says nothing.
    inside = [spearman(chosen[name], truth[name].tolist()) for name in picks if len(picks[name]) >= FEWEST]
    every = spearman([v for name in picks for v in chosen[name]], [v for name in picks for v in truth[name].tolist()])
    return {"all": every, "within": _mean(inside)}


def over_seeds(label: str, found: Sequence[ScoreFidelity]) -> FidelityLine:
    """Means over the seeds, for the tables."""
    return {
        "criterion": label,
        "seeds": len(found),
        "all": _mean([one["all"] for one in found]),
        "within": _mean([one["within"] for one in found]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
