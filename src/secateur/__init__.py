"""secateur: prune any PyTorch model, prove that the result is right, measure what it brings."""

from __future__ import annotations

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur.version import __version__

if TYPE_CHECKING:
    from secateur import criteria
    from secateur.advice.advise import advise
    from secateur.amounts.select import select
    from secateur.api import inspect, score
    from secateur.comparison.compare import compare
    from secateur.deployment import deploy, export, load_deployed, save_deployed
    from secateur.errors import SecateurError
    from secateur.interrupted import resume
    from secateur.loading import load
    from secateur.masks import import_masks, mask_model
    from secateur.model.share import shared
    from secateur.pipeline import estimate, prune
    from secateur.planning import Plan
    from secateur.planning import make_plan as plan
    from secateur.recipe import Recipe, load_recipe
    from secateur.result import Result
    from secateur.search.sensitivity import sensitivity
    from secateur.tickets.lottery import lottery
    from secateur.training import MovementPruner, Pruner

_HOME = {
    "MovementPruner": "secateur.training:MovementPruner",
    "Plan": "secateur.planning:Plan",
    "Pruner": "secateur.training:Pruner",
    "Recipe": "secateur.recipe:Recipe",
    "Result": "secateur.result:Result",
    "SecateurError": "secateur.errors:SecateurError",
    "advise": "secateur.advice.advise:advise",
    "compare": "secateur.comparison.compare:compare",
    "criteria": "secateur.criteria",
    "deploy": "secateur.deployment:deploy",
    "estimate": "secateur.pipeline:estimate",
    "export": "secateur.deployment:export",
    "import_masks": "secateur.masks:import_masks",
    "inspect": "secateur.api:inspect",
    "load": "secateur.loading:load",
    "load_deployed": "secateur.deployment:load_deployed",
    "load_recipe": "secateur.recipe:load_recipe",
    "lottery": "secateur.tickets.lottery:lottery",
    "mask_model": "secateur.masks:mask_model",
    "plan": "secateur.planning:make_plan",
    "prune": "secateur.pipeline:prune",
    "resume": "secateur.interrupted:resume",
    "save_deployed": "secateur.deployment:save_deployed",
    "score": "secateur.api:score",
    "sensitivity": "secateur.search.sensitivity:sensitivity",
    "shared": "secateur.model.share:shared",
    "select": "secateur.amounts:select",
}

__all__ = [
    "MovementPruner",
    "Plan",
    "Pruner",
    "Recipe",
    "Result",
    "SecateurError",
    "__version__",
    "advise",
    "compare",
    "criteria",
    "deploy",
    "estimate",
    "export",
    "import_masks",
    "inspect",
    "load",
    "load_deployed",
    "load_recipe",
    "lottery",
    "mask_model",
    "plan",
    "prune",
    "resume",
    "save_deployed",
    "score",
    "select",
    "sensitivity",
    "shared",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: the command line's help needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    chance = random.getstate()
    try:
        found = import_module(module)
    finally:
        random.setstate(chance)  # rich draws from it while it is imported, and the user's program goes on drawing
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value
