"""After pruning, move the weights that stay to the minimum of a quadratic model of the loss: the update of OBS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.base import Context
from secateur.criteria.curvature.obs import OptimalBrainSurgeon
from secateur.errors import RecipeError
from secateur.types import Cuts, Data, Group, Loss, Span


def obs_update(
    original: nn.Module,
    pruned: nn.Module,
    data: Data,
    *,
    cuts: Cuts,
    masks: Mapping[str, Tensor],
    loss: Loss | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """Let the weights that stay make up for those that go, in one step; changes `pruned` in place.

    The idea: around the original weights w the loss rises by d^T F d / 2, F the empirical Fisher matrix with damping.
    Of all moves d that put the removed weights Q to zero the cheapest is d = -F^-1[:, Q] (F^-1[Q, Q])^-1 w_Q.
    Every tensor that lost something moves. A bad choice for large cuts in one go, where the quadratic model
    does not hold (fine-tune, or prune in several rounds), and for networks that fit their data, whose gradients
    vanish.

    Args:
        original: the model before.
        pruned: as the plan left it: its weights are those of the original, without what goes.
        data: labelled batches; read once, and once more per damping that is tried.
        cuts: tensor name -> dimension -> kept indices, as in a plan.
        masks: parameter name -> bool, True = keep.
        loss: ``loss(model, batch) -> scalar``; default from the batches.
        seed: of everything random.
        options: of `secateur.criteria.OptimalBrainSurgeon`: form, gradients, block_size, damping.

    Returns:
        Name of every changed parameter -> its new value, in the shape of the pruned model.

    Raises:
        RecipeError: the pruned model was changed after the cut, or a wrong option.
        InputError: batches without targets and no loss, or curvature that cannot be inverted.
        NonFiniteError: the loss or a gradient is NaN or Inf.

    Cost:
        As criterion "obs": N per-sample gradients of the weights that may move, and N^2 times as many operations.

    Source:
        Hassibi, Stork 1992, equation 5; Kurtic et al., "The Optimal BERT Surgeon", 2022, equation 4 (sets).
    """
    before, after = dict(original.named_parameters()), dict(pruned.named_parameters())
    keep = {name: masks[name].cpu() for name in masks} | {
        name: _kept(before[name].shape, kept) for name, kept in cuts.items() if name in before
    }
    for name in keep:
        expected = _slices(before[name].detach(), cuts.get(name, {}))
        if name in masks:
            expected = expected * masks[name].to(expected.device)
        if not torch.equal(expected, after[name].detach()):
            raise RecipeError(
                f"{name!r} was changed after it was pruned, and the OBS update starts from the original weights",
                hint="put obs_update before every other recovery step",
            )
    if not keep:
        return {}
    groups = [Group(name, "element", tuple(before[name].shape), (Span(name, None, "self"),)) for name in keep]
    context = Context(original, groups, data=data, loss=loss, seed=seed)
    moved = OptimalBrainSurgeon(**options).update(context, keep)
    changed = {name: _slices(value, cuts.get(name, {})) for name, value in moved.items()}
    with torch.no_grad():
        for name, value in changed.items():
            after[name].copy_(value)
    return changed


def _kept(shape: torch.Size, kept: Mapping[int, Tensor]) -> Tensor:
    """True where an element lies in all kept slices."""
    stays = torch.ones(shape, dtype=torch.bool)
    for dim, index in kept.items():
        line = torch.zeros(shape[dim], dtype=torch.bool)
        line[index.cpu()] = True
        stays &= line.view([-1 if d == dim else 1 for d in range(len(shape))])
    return stays


def _slices(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor
