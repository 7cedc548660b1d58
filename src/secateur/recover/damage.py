"""What a plan did to a model, as far as recovery needs it, and zeros that a recovery loses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from torch import Tensor, nn

from secateur.planning.decision import PlanData
from secateur.planning.history import zeros_of
from secateur.types import Cuts, LayerEntry

SPARSE = 0.01  # of a matrix: with fewer zeros it is taken for a dense one, and their loss is not spoken of
NAMED = 3  # matrices that are named


class LostZerosWarning(UserWarning):
    """Weights that were zero before a recovery are not any more."""


@dataclass(frozen=True, eq=False)
class Damage:
    """What was pruned.

    Args:
        original: the model before.
        cuts: slices that are gone; empty for masks and for the dense model.
        masks: zeros that must stay: those of this plan, and of earlier ones that the model remembers.
        layers: whole layers that are gone; empty for everything else.
        made: names of the masks that this plan made.
    """

    original: nn.Module
    cuts: Cuts
    masks: Mapping[str, Tensor]
    layers: Mapping[str, LayerEntry] = field(default_factory=dict)
    made: Set[str] = frozenset()


def damage_of(original: nn.Module, plan: PlanData, pruned: nn.Module) -> Damage:
    """What a plan did to the model that it left.

    Args:
        original: the model before.
        plan: that was applied to it.
        pruned: what ``plan.apply(original)`` returned.
    """
    made = plan.edit.masks_after(original)
    return Damage(original, plan.cuts, {**made, **zeros_of(pruned)}, plan.layers, made.keys())


def untouched(original: nn.Module) -> Damage:
    """No damage: what a recovery of the model as it came starts from. Its zeros of earlier rounds stay too."""
    return Damage(original, {}, zeros_of(original))


def zero_shares(model: nn.Module) -> dict[str, float]:
    """Name of every matrix that has some zeros, and not zeros alone -> the share that they are."""
    shares = {name: _zeros(p) for name, p in model.named_parameters() if p.dim() > 1}
    return {name: share for name, share in shares.items() if SPARSE <= share < 1}


def warn_of_lost_zeros(model: nn.Module, before: Mapping[str, float], step: str) -> None:
    """Say where weights that were zero are not any more.

    Args:
        model: after a recovery step.
        before: `zero_shares` before it.
        step: what it is called.
    """
    after = {name: _zeros(model.get_parameter(name)) for name in before}
    lost = [name for name, share in before.items() if after[name] < share / 2]
    if lost:
        shares = [f"{name}: {before[name]:.0%} -> {after[name]:.0%}" for name in lost[:NAMED]]
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        warnings.warn(
            f"{step} filled zeros that the model came with ({', '.join(shares)}{more}), since no plan that made them "
            "is known. Such zeros are kept in a model that was pruned in this process, or read by secateur.load",
            LostZerosWarning,
            stacklevel=3,
        )


def _zeros(weight: Tensor) -> float:
    return 1 - int(weight.detach().count_nonzero()) / max(weight.numel(), 1)
