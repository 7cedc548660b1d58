"""Which plan leads from the first model to one that was pruned in this process.

Kept beside the models, not on them: what is handed back is an ordinary module. A copy of a model has no history.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor, nn

from secateur.kinds.layers.drop import old_names
from secateur.kinds.slices.cut import cut_copy
from secateur.planning.decision import PlanData, fingerprint

# Model -> the plan that leads to it, and the fingerprint that it had then.
_ORIGINS: WeakKeyDictionary[nn.Module, tuple[PlanData, str]] = WeakKeyDictionary()


def remember(model: nn.Module, plan: PlanData) -> None:
    """Note that a plan leads from a first model to this one."""
    _ORIGINS[model] = plan, fingerprint(model)


def copy_to_go_on_with(model: nn.Module) -> nn.Module:
    """A copy that remembers what its model does, so that zeros of earlier rounds stay while it is trained.

    `cut_copy` and not deepcopy: it knows the modules that a plain copy breaks.
    """
    copy, plan = cut_copy(model, {}, {}), origin_of(model)
    if plan is not None:
        remember(copy, plan)
    return copy


def origin_of(model: nn.Module) -> PlanData | None:
    """The plan that leads from the first model to this one, if it was pruned or loaded in this process.

    None, too, where the model was changed since by other hands (another head, other widths): the plan leads somewhere
    else then, and the model as it is counts as a first one.
    """
    plan, then = _ORIGINS.get(model, (None, ""))
    return plan if plan is not None and fingerprint(model) == then else None


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks of every round that led to a model which was pruned or loaded in this process.

    Returns:
        parameter name as in this model -> bool of its shape, True = keep; empty where nothing is known.
    """
    plan = origin_of(model)
    if plan is None or not plan.masks:
        return {}
    first = old_names(model, plan.layers)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name: plan.masks[first(name)] for name in names if first(name) in plan.masks}
