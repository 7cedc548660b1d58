"""The low-level surface: look, score and decide without a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from secateur import criteria
from secateur.criteria.base import Context
from secateur.kinds.slices.anew import lock_computed
from secateur.model.admit import PREPARE_AFTER, admit, is_rounding
from secateur.model.call import as_loss, several
from secateur.model.carried import refuse_carried_masks
from secateur.model.protect import patterns_of
from secateur.model.written import weights_kept
from secateur.planning.build import CriterionLike, GranularityLike, criterion_of, grouped
from secateur.request import CRITERION
from secateur.structure.view import View, look
from secateur.types import Data, Example, Group, Loss, Protect, Scores
from secateur.words import spoken


@spoken()
def inspect(
    model: nn.Module, example: Example = None, *, protect: Protect = (), examples: Sequence[Example] = ()
) -> View:
    """What can be cut, what goes with it, what is locked, by which line of code, and what that costs.

    Args:
        model: any module that runs on `example`; left as it is.
        example: a tensor, a tuple of positional or a mapping of keyword arguments.
        protect: names, patterns, or modules of the model that stay whole.
        examples: several examples, in the place of `example` or beside it; what any of them needs is locked.

    Returns:
        a view with `groups`, `locked`, `to_dict()` and a readable `str()`.

    Raises:
        ForwardError: the forward fails on the example.
        InputError, UnsupportedError: what is given is no model, or one of a kind that cannot be pruned; says which.

    Cost: one forward pass.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [group.name for group in inspect(net, torch.zeros(1, 4)).groups]
        ['0']
    """
    model = admit(model, prepared=True)
    refuse_carried_masks(model)  # its groups would bear names of hidden tensors, which nothing else takes
    example, examples = several(example, examples)
    with weights_kept(model):
        view = look(model, example, patterns_of(model, protect), examples, lock_computed)
    return replace(view, locked=tuple(_reworded(group) for group in view.locked))


def _reworded(group: Group) -> Group:
    """A group that fake quantisation locks is told what to do about it: no rule is missing there."""
    locks = tuple(replace(lock, hint=PREPARE_AFTER) if is_rounding(lock.op) else lock for lock in group.locks)
    return replace(group, locks=locks)


@spoken()
def score(
    model: nn.Module,
    example: Example = None,
    *,
    criterion: CriterionLike = CRITERION,
    granularity: GranularityLike | None = None,
    data: Data | None = None,
    loss: Loss | None = None,
    protect: Protect = (),
    seed: int = 0,
) -> Scores:
    """Score every unit; higher = keep.

    Args:
        model: left as it is.
        example: forward inputs; needed for channel, neuron, head and the like, which the structure engine finds.
        criterion: name, {"name": ..., options} or object.
        granularity: what the units are, as in `plan`; default channel, without an example element.
        data: batches, where the criterion needs them.
        loss: ``loss(model, batch) -> scalar``, where the criterion needs one and the batches do not imply it.
        protect: names, patterns, or modules of the model that stay whole.
        seed: of everything random.

    Returns:
        parameter name (masks) or group name (cuts) -> float32 scores; a dict that also holds the `groups`, so that
        `select`, `mask_model` and `plan(keep=...)` know what the units are.

    Raises:
        RecipeError: an unknown name, or data are missing.
        InputError, UnsupportedError: as for `inspect`.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -2.0], [1.0, -5.0]]))
        >>> score(nn.Sequential(layer), granularity={"name": "vector", "axis": "row"})["0.weight"]
        tensor([3.6056, 5.0990])
    """
    model = admit(model)
    groups, record = grouped(model, example, granularity, protect)
    context = Context(model, groups, data=data, loss=as_loss(loss), example=example, seed=seed, capture=record)
    with weights_kept(model):
        return Scores(criterion_of(criterion).score(context), groups)


__all__ = ["Group", "criteria", "inspect", "score"]
