"""Choices that the others leave without a meaning. They are refused: who gave one would believe that it was kept to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields

from secateur.errors import RecipeError
from secateur.kinds.find import kind_of
from secateur.kinds.weights.nm import NM
from secateur.recipe import Recipe
from secateur.request import ALLOCATION, MIN_KEEP, MIN_KEEP_FRACTION, PROOF, SCALES, Named
from secateur.solve.base import Solver
from secateur.solve.blocks.settings import Settings

USUAL: Mapping[str, object] = {
    "allocation": ALLOCATION,
    "min_keep": MIN_KEEP,
    "min_keep_fraction": MIN_KEEP_FRACTION,
    "round_to": None,
    "scales": SCALES,
    "expressible": False,
    "proof": PROOF,
    "dtype": "float32",
    "tolerance": None,
}
"""What stands where nobody chose: as good as left out."""
HOLDS: Mapping[str, object] = {"min_keep": 0, "min_keep_fraction": 0, "round_to": 1, "proof": "example"}
"""What asks for nothing, and so is kept to wherever it is not read."""
WHERE = {"proof": "verify.proof", "dtype": "verify.dtype", "tolerance": "verify.tolerance"}
ZEROS = "zeros are written: no width changes, and no cut has to be proved"
EQUAL = "every group loses the same share, and so keeps its own"


def refuse_unread(
    granularity: tuple[Named, ...],
    choices: Mapping[str, object],
    *,
    solver: Solver | None = None,
    blocks: Mapping[str, object] | None = None,
) -> None:
    """Refuse a choice that nothing reads beside the granularity, scope or solver that was chosen.

    Args:
        granularity: what a unit is.
        choices: keywords of `secateur.plan`: those of `USUAL`, and scope.
        solver: that decides block by block; None where scores do.
        blocks: settings of the solver that were given.

    Raises:
        RecipeError: names the first of them, and why.
    """
    for name, why in _unread(granularity, choices, solver).items():
        value = choices.get(name, USUAL[name])
        if value not in (USUAL[name], HOLDS.get(name, USUAL[name])):
            raise _refused(WHERE.get(name, name), value, why)
    settings = {one.name: one.default for one in fields(Settings)}
    # How a solver that leaves weights where they are goes towards outputs is never asked.
    idle: Collection[str] = () if solver is not None else settings
    if solver is not None and not solver.moves:
        idle = ("shrinkage",) if blocks is not None and blocks.get("reconstruct") else ("shrinkage", "targets")
    why = "no solver runs" if solver is None else f"{solver.name} moves no weight"
    for name in idle:
        if blocks is not None and blocks.get(name, settings[name]) != settings[name]:
            raise _refused(f"blocks.{name}", blocks[name], why)


def refuse_others(recipe: Recipe, reads: Collection[str], who: str) -> None:
    """Refuse keys of a recipe that somebody who takes only a part of it does not read.

    Args:
        recipe: checked.
        reads: keys that are read.
        who: for the message: "a search for tickets".

    Raises:
        RecipeError: names the first key beyond them that is not as it would be if it were left out.
    """
    usual = Recipe(target=recipe.target)
    for name, info in Recipe.model_fields.items():
        if name not in reads and getattr(recipe, name) != getattr(usual, name):
            key = info.alias or name
            raise RecipeError(f"{who} does not read {key}.", hint=f"Leave it out of the recipe, or --set {key}=null.")


def _unread(granularity: tuple[Named, ...], choices: Mapping[str, object], solver: Solver | None) -> dict[str, str]:
    """Choice -> why nothing reads it."""
    kind = kind_of(granularity)
    found = dict.fromkeys(kind.unread, ZEROS if not kind.physical else "it is about widths that are cut")
    if _fixed(granularity[0].name):
        what = f"{granularity[0].name} leaves nothing else to choose"
        found |= {"allocation": what, "min_keep": what}
    if kind.physical and (kind.scope or choices.get("scope") == "local" or choices.get("allocation") == "uniform"):
        found["min_keep_fraction"] = EQUAL
    if solver is not None:
        what = f"solver {solver.name} takes the target's share of every matrix"
        found |= {"allocation": f"{what}; blocks.allocation lets blocks differ", "min_keep": what, "expressible": ZEROS}
    return found


def _fixed(name: str) -> bool:
    """Whether a granularity is an n:m pattern; by its name, as one of the user's own may not be registered."""
    kept, _, of = name.partition(":")
    return name == NM.name or (kept.isdecimal() and of.isdecimal())


def _refused(name: str, value: object, why: str) -> RecipeError:
    return RecipeError(
        f"{name}: {value} would have no effect.",
        why=why,
        hint=f"Leave it out; where it stands in a recipe, --set {name}=null.",
    )
