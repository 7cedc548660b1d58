"""Other amounts for some groups than for others, told by patterns of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from secateur.errors import RecipeError
from secateur.kinds.weights.granularity import is_within
from secateur.registry import suggestion

T = TypeVar("T")


def per_pattern(names: Iterable[str], amounts: Mapping[str, T], *, what: str = "sparsity") -> list[tuple[list[str], T]]:
    """Deal groups out to patterns; the first pattern that matches a group counts.

    Args:
        names: names of the groups.
        amounts: pattern -> amount. A pattern is the name of a group, or of a module that holds it, with shell
            wildcards; "*" matches whatever is left.
        what: the option's name, for errors.

    Returns:
        (names, amount) for every pattern, in the order of the patterns; names in the order they came in.

    Raises:
        RecipeError: no pattern at all, a pattern that matches nothing, or nothing that is left to it, or a group
            that no pattern matches. None of these is read as "leave it whole": say 0 for that.

    Example:
        >>> per_pattern(["encoder.0", "encoder.1", "head"], {"encoder.*": 0.3, "*": 0.5})
        [(['encoder.0', 'encoder.1'], 0.3), (['head'], 0.5)]
    """
    known = list(names)
    if not amounts:
        raise RecipeError(f"{what} names no pattern", hint='for example {"encoder.*": 0.3, "*": 0.5}')
    sets: dict[str, list[str]] = {pattern: [] for pattern in amounts}
    unmatched: list[str] = []
    for name in known:
        first = next((pattern for pattern in amounts if is_within(name, [pattern])), None)
        (unmatched if first is None else sets[first]).append(name)
    # Idle patterns first: a misspelt pattern leaves its groups unmatched, and its own name is the better message.
    for pattern, members in sets.items():
        if not members:
            _refuse_idle(pattern, known, amounts, what)
    if unmatched:
        # Leaving it whole would be a silent choice.
        raise RecipeError(
            f"{what}: no pattern matches {unmatched[0]!r}",
            hint='add "*" with an amount for the rest (0 leaves it whole)',
        )
    return [(members, amounts[pattern]) for pattern, members in sets.items()]


def _refuse_idle(pattern: str, names: list[str], amounts: Mapping[str, object], what: str) -> None:
    takers = {first for name in names if is_within(name, [pattern]) for first in amounts if is_within(name, [first])}
    earlier = [other for other in amounts if other in takers and other != pattern]
    if earlier:
        raise RecipeError(
            f"{what}: the pattern {pattern!r} has nothing left, all it matches goes to {earlier[0]!r}",
            hint="the first pattern that matches counts: put the narrower one first",
        )
    raise RecipeError(f"{what}: the pattern {pattern!r} matches no group", hint=suggestion(pattern, names))
