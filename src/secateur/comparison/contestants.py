"""Who takes part: the criteria that were asked for, the reference and the control."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.criteria.base import Criterion
from secateur.errors import RecipeError
from secateur.planning.build import criterion_of
from secateur.types import Json

REFERENCE = "magnitude"
RANDOM = "random"

CriterionChoice = str | Mapping[str, object] | Criterion


@dataclass(frozen=True, eq=False)
class Contestant:
    """One criterion of a comparison.

    Args:
        label: how the tables call it; unique.
        criterion: the criterion.
        control: whether it was added by the protocol and not asked for.
    """

    label: str
    criterion: Criterion
    control: bool = False

    @property
    def identity(self) -> dict[str, Json]:
        """Name and options, as they go into hashes."""
        return {"name": self.criterion.name, **self.criterion.options()}


def make_contestants(criteria: Iterable[CriterionChoice]) -> list[Contestant]:
    """The criteria with unique labels, the reference and the random control added where they are missing.

    Args:
        criteria: names, {"name": ..., options} or objects.

    Returns:
        Those that were asked for, in their order, then what was added.

    Raises:
        RecipeError: an unknown name, or the same criterion twice.
    """
    # Registered on import; the package's own list may be read later than this module.
    from secateur.criteria.weights.random_control import Random

    asked = [criterion_of(choice) for choice in criteria]
    if not asked:
        raise RecipeError("there is no criterion to compare", hint="for example criteria=['taylor', 'magnitude']")
    found: list[Contestant] = []
    for criterion in asked:
        options = _unusual_options(criterion)
        label = f"{criterion.name} {options}" if options else criterion.name
        # Two lines of one label would be one line in every table, and the mean of both in every test.
        if any(label == one.label for one in found):
            raise RecipeError(f"the criterion {label!r} is named twice", hint="name each one once")
        found.append(Contestant(label, criterion, control=criterion.name == RANDOM))
    # By label: magnitude with other options is a contestant like any other, and no reference.
    if not any(one.label == REFERENCE for one in found):
        found.append(Contestant(REFERENCE, criterion_of(REFERENCE), control=True))
    # By name: a random control with another seed is as good as the one that would be added.
    if not any(one.criterion.name == RANDOM for one in found):
        found.append(Contestant(RANDOM, Random(), control=True))
    return found


def _unusual_options(criterion: Criterion) -> str:
    """The options that are not the defaults, shortly."""
    try:
        usual = type(criterion)().options()
    except TypeError:  # an option without a default: all of them are worth saying
        usual = {}
    return ",".join(f"{key}={value}" for key, value in criterion.options().items() if usual.get(key, ...) != value)
