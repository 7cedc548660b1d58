"""How much goes: the levels of a comparison, and what they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.errors import RecipeError
from secateur.kinds.weights.granularity import Granularity, parse
from secateur.kinds.weights.nm import NM
from secateur.planning.build import is_structured

ELEMENT_LEVELS = (0.5, 0.67, 0.8, 0.9, 0.95, 0.98)  # geometric in what is left
CUT_LEVELS = (0.2, 0.35, 0.5, 0.65, 0.75, 0.85)  # of the multiply-accumulates
MATCHES = ("macs", "params", "units")


def make_levels(
    levels: Sequence[float] | None, match: str, granularity: str | Mapping[str, Any] | Granularity
) -> tuple[float, ...]:
    """The levels in ascending order, checked; an n:m pattern has the one that it implies.

    Raises:
        RecipeError: a level outside (0, 1), none, or one that the pattern cannot have.
    """
    pattern = None if is_structured(granularity) else parse(granularity)
    if isinstance(pattern, NM):
        implied = 1 - pattern.n / pattern.m
        if levels is not None and any(abs(level - implied) > 1e-9 for level in levels):
            raise RecipeError(f"granularity {pattern.name!r} has the one level {implied:g}", hint="leave levels out")
        return (implied,)
    found = sorted(set(levels)) if levels is not None else [*(ELEMENT_LEVELS if match == "units" else CUT_LEVELS)]
    for level in found:
        if isinstance(level, bool) or not 0 < level < 1:
            hint = f"write {level / 100:g}" if 1 <= level < 100 else "for example 0.5"
            raise RecipeError(f"level {level!r} is no fraction removed, between 0 and 1", hint=hint)
    if not found:
        raise RecipeError("there is no level", hint="leave levels out for the default of six")
    return tuple(float(level) for level in found)


def among(name: str, chosen: Sequence[float], levels: Sequence[float]) -> tuple[float, ...]:
    """Levels that were chosen out of all levels.

    Raises:
        RecipeError: one that is not among them.
    """
    for level in chosen:
        if level not in levels:
            raise RecipeError(f"{name}: {level:g} is not among the levels {[*levels]}")
    return tuple(sorted({float(level) for level in chosen}))


def make_match(match: str, granularity: str | Mapping[str, Any] | Granularity) -> str:
    """What levels count: "auto" is macs for cuts (params for experts, which leave the work as it is), units for masks.

    Raises:
        RecipeError: an unknown word, or costs that masks do not change.
    """
    cuts = is_structured(granularity)
    if not cuts:
        parse(granularity)
    if match == "auto":
        return "params" if granularity == "expert" else "macs" if cuts else "units"
    if match not in MATCHES:
        raise RecipeError(f"match={match!r} is not known", hint=f"known: auto, {', '.join(MATCHES)}")
    if match != "units" and not cuts:
        raise RecipeError(f"match={match!r} needs a granularity that is cut", hint="masks remove no MACs: use units")
    return match


def plain_granularity(granularity: str | Mapping[str, Any] | Granularity) -> str | dict[str, Any]:
    """As a recipe writes it."""
    if isinstance(granularity, str):
        return granularity
    return dict(granularity) if isinstance(granularity, Mapping) else granularity.options()
