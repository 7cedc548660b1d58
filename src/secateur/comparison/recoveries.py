"""What is done after a cut: named lists of recovery steps, checked as a recipe checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.recipe import load_recipe
from secateur.types import Json

NO_RECOVERY = "none"
CLOSED_FORM = ("refit", "obs_update")

Steps = Sequence[Mapping[str, Json]]  # as they are asked for
CheckedSteps = tuple[dict[str, Json], ...]  # with every default filled in


def make_recoveries(recover: Steps | Mapping[str, Steps] | None) -> dict[str, CheckedSteps]:
    """Named recoveries with every default filled in; "none" comes first.

    Args:
        recover: one list of steps, which is then called "recovered", or several by name.

    Raises:
        RecipeError: a step that no recipe would take.
    """
    named = recover if isinstance(recover, Mapping) else {"recovered": recover} if recover else {}
    # What a cut does by itself is always shown: a recovery may hide it.
    found: dict[str, CheckedSteps] = {NO_RECOVERY: ()}
    for name, steps in named.items():
        if name != NO_RECOVERY:
            found[name] = check_steps(steps)
    return found


def check_steps(steps: Steps) -> CheckedSteps:
    """Recovery steps as a recipe reads them, with defaults.

    Raises:
        RecipeError: says what is wrong, as for a recipe.
    """
    # Defaults are filled in before anything is hashed: a default that changes must change the address of a result.
    recipe = load_recipe({"target": {"sparsity": 0.5}, "recover": [dict(step) for step in steps]})
    return tuple(step.model_dump(mode="json", exclude_none=True) for step in recipe.recover)


def trains(steps: Steps) -> bool:
    """Whether the steps read training batches; what is solved in closed form reads the scoring samples alone."""
    return any(step["method"] not in CLOSED_FORM for step in steps)
