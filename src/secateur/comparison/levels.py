"""How much goes: the levels of a comparison, and what they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.errors import RecipeError
from secateur.kinds.weights.granularity import Granularity, parse
from secateur.kinds.weights.nm import NM
from secateur.planning.build import is_structured, units_of, what_it_saves
from secateur.types import Json

ELEMENT_LEVELS = (0.5, 0.67, 0.8, 0.9, 0.95, 0.98)  # geometric in what is left
CUT_LEVELS = (0.2, 0.35, 0.5, 0.65, 0.75, 0.85)  # of the multiply-accumulates
MATCHES = ("macs", "params", "units")

GranularityChoice = str | Mapping[str, Json] | Granularity


def make_levels(levels: Sequence[float] | None, match: str, granularity: GranularityChoice) -> tuple[float, ...]:
    """The levels in ascending order, each once; an n:m pattern has the one that it implies.

    Args:
        levels: fractions removed; None = six by default.
        match: what they count.
        granularity: what is removed.

    Raises:
        RecipeError: a level that is no fraction removed, none, or one that the pattern cannot have.
    """
    pattern = None if is_structured(granularity) else parse(granularity)
    if isinstance(pattern, NM):
        implied = 1 - pattern.n / pattern.m
        if levels is not None and any(abs(level - implied) > 1e-9 for level in levels):
            raise RecipeError(f"granularity {pattern.name!r} has the one level {implied:g}", hint="leave levels out")
        return (implied,)
    if levels is None:
        return ELEMENT_LEVELS if match == "units" else CUT_LEVELS
    for level in levels:
        check_level(level)
    if not levels:
        raise RecipeError("there is no level", hint="leave levels out for the default of six")
    return tuple(sorted({float(level) for level in levels}))


def check_level(level: float) -> None:
    """Refuse what is no fraction removed.

    Raises:
        RecipeError: not between 0 and 1.
    """
    # True is the number 1 to Python, and a slip of the pen to everybody else.
    if isinstance(level, bool) or not 0 < level < 1:
        hint = f"write {level / 100:g}" if 1 <= level < 100 else "for example 0.5"
        raise RecipeError(f"level {level!r} is no fraction removed, between 0 and 1", hint=hint)


def among(name: str, chosen: Sequence[float], levels: Sequence[float]) -> tuple[float, ...]:
    """Levels that were chosen out of all levels, ascending, each once.

    Raises:
        RecipeError: one that is not among them.
    """
    for level in chosen:
        if level not in levels:
            raise RecipeError(f"{name}: {level:g} is not among the levels {[*levels]}")
    return tuple(sorted({float(level) for level in chosen}))


def middle_of(levels: Sequence[float]) -> float:
    """The middle level; the lower of two, where a network is still more than a ruin."""
    return levels[(len(levels) - 1) // 2]


def make_match(match: str, granularity: GranularityChoice) -> str:
    """What levels count: "auto" is what units of the granularity take with them, or for masks the units.

    Raises:
        RecipeError: an unknown word, or costs that masks do not change.
    """
    cuts = is_structured(granularity)
    if not cuts:
        parse(granularity)  # refuses an unknown granularity here, and not in the middle of a run
    if match == "auto":
        return what_it_saves(granularity) or "units"
    if match not in MATCHES:
        raise RecipeError(f"match={match!r} is not known", hint=f"known: auto, {', '.join(MATCHES)}")
    if match != "units" and not cuts:
        raise RecipeError(f"match={match!r} needs a granularity that is cut", hint="masks remove no MACs: use units")
    return match


def plain_granularity(granularity: GranularityChoice) -> str | dict[str, Json]:
    """As a recipe writes it, by the name that it has here: other words for it would be other cells.

    Raises:
        RecipeError: several.

    Example:
        >>> plain_granularity("filters"), plain_granularity(NM(n=2, m=4))
        ('channel', '2:4')
    """
    _, choices = units_of(granularity, None)
    if len(choices) > 1:
        raise RecipeError(
            "A comparison is of one granularity.",
            why=f"{len(choices)} were given: {', '.join(choice.name for choice in choices)}",
            hint='"structured" ranks slices of all kinds together',
        )
    return choices[0].spec()
