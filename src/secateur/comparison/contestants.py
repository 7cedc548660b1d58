"""Who takes part: the criteria that were asked for, the reference and the control."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.criteria.base import Criterion
from secateur.errors import RecipeError
from secateur.planning.build import rule_of

REFERENCE = "magnitude"
RANDOM = "random"

Choice = str | Mapping[str, Any] | Criterion


@dataclass(frozen=True, eq=False)
class Contestant:
    """One criterion of a comparison.

    Args:
        label: how the tables call it; unique.
        rule: the criterion.
        control: whether it was added by the protocol and not asked for.
    """

    label: str
    rule: Criterion
    control: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """Name and options, as they go into hashes."""
        return {"name": self.rule.name, **self.rule.options()}


def make_contestants(criteria: Iterable[Choice]) -> list[Contestant]:
    """The criteria with unique labels, the reference and the random control added where they are missing.

    Raises:
        RecipeError: an unknown name, or the same criterion twice.
    """
    # Registered on import; the package's own list may be read later than this module.
    from secateur.criteria.weights.random_control import Random

    asked = [rule_of(choice) for choice in criteria]
    if not asked:
        raise RecipeError("there is no criterion to compare", hint="for example criteria=['taylor', 'magnitude']")
    contestants: list[Contestant] = []
    for rule in asked:
        options = _options(rule)
        label = f"{rule.name} {options}" if options else rule.name
        if any(label == one.label for one in contestants):
            raise RecipeError(f"the criterion {label!r} is named twice", hint="name each one once")
        contestants.append(Contestant(label, rule, control=rule.name == RANDOM))
    if not any(one.label == REFERENCE for one in contestants):
        contestants.append(Contestant(REFERENCE, rule_of(REFERENCE), control=True))
    if not any(one.rule.name == RANDOM for one in contestants):
        contestants.append(Contestant(RANDOM, Random(), control=True))
    return contestants


def _options(rule: Criterion) -> str:
    """The options that are not the defaults, shortly."""
    try:
        usual = type(rule)().options()
    except TypeError:
        usual = {}
    return ",".join(f"{key}={value}" for key, value in rule.options().items() if usual.get(key, ...) != value)
