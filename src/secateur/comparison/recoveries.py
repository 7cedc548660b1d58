"""What is done after a cut: named lists of recovery steps, checked as a recipe checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.recipe import load_recipe

NO_RECOVERY = "none"
Steps = Sequence[Mapping[str, Any]]


def make_recoveries(
    recover: Steps | Mapping[str, Steps] | None,
) -> dict[str, tuple[dict[str, Any], ...]]:
    """Named recoveries with every default filled in; "none" comes first.

    Raises:
        RecipeError: a step that no recipe would take.
    """
    named = recover if isinstance(recover, Mapping) else {"recovered": recover} if recover else {}
    found: dict[str, tuple[dict[str, Any], ...]] = {NO_RECOVERY: ()}
    for name, steps in named.items():
        if name != NO_RECOVERY:
            found[name] = check_steps(steps)
    return found


def check_steps(steps: Steps) -> tuple[dict[str, Any], ...]:
    """Recovery steps as a recipe reads them, with defaults.

    Raises:
        RecipeError: says what is wrong, as for a recipe.
    """
    recipe = load_recipe({"target": {"sparsity": 0.5}, "recover": [dict(step) for step in steps]})
    return tuple(step.model_dump(mode="json", exclude_none=True) for step in recipe.recover)
