"""Which plan leads from the first model to one that was pruned in this process.

Kept beside the models, not on them: what is handed back is an ordinary module. A copy of a model has no history.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from secateur.planning.decision import PlanData

_ORIGINS: WeakKeyDictionary[nn.Module, PlanData] = WeakKeyDictionary()


def remember(model: nn.Module, plan: PlanData) -> None:
    """Note that a plan leads from a first model to this one."""
    _ORIGINS[model] = plan


def origin_of(model: nn.Module) -> PlanData | None:
    """The plan that leads from the first model to this one, if it was pruned or loaded in this process."""
    return _ORIGINS.get(model)
