"""Which plan leads from the first model to one that was pruned in this process.

Kept beside the models, not on them: what is handed back is an ordinary module. A copy of a model has no history.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from secateur.planning.decision import PlanData, fingerprint

# Model -> the plan that leads to it, and the fingerprint that it had then.
_ORIGINS: WeakKeyDictionary[nn.Module, tuple[PlanData, str]] = WeakKeyDictionary()


def remember(model: nn.Module, plan: PlanData) -> None:
    """Note that a plan leads from a first model to this one."""
    _ORIGINS[model] = plan, fingerprint(model)


def origin_of(model: nn.Module) -> PlanData | None:
    """The plan that leads from the first model to this one, if it was pruned or loaded in this process.

    None, too, where the model was changed since by other hands (another head, other widths): the plan leads somewhere
    else then, and the model as it is counts as a first one.
    """
    plan, then = _ORIGINS.get(model, (None, ""))
    return plan if plan is not None and fingerprint(model) == then else None
