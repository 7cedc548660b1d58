"""What every rule of regrowth is: how many units are exchanged, and which masked ones come back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Generator, Tensor

from secateur.errors import RecipeError
from secateur.kinds.base import Candidates
from secateur.kinds.weights.kind import Weights
from secateur.kinds.weights.nm import NM
from secateur.registry import Registry
from secateur.request import Named
from secateur.types import Group


@dataclass(frozen=True, kw_only=True)
class Regrowth(ABC):
    """At every update the smallest kept units of each group are exchanged for as many masked ones, which start at 0.

    Args:
        fraction: share of the kept units that is exchanged at the first update; it falls along half a cosine to 0 at
            `end`, so that the masks come to rest.

    Raises:
        RecipeError: not a share in (0, 1].
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_gradients: ClassVar[bool] = False  # of all weights, masked ones included

    fraction: float = 0.3

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.fraction <= 1:
            raise RecipeError(f"fraction={self.fraction!r} of {self.name}", hint="a share in (0, 1]")

    def check(self, candidates: Candidates, *, earlier: bool) -> None:
        """Refuse what nothing can grow back in.

        Args:
            candidates: what is removed.
            earlier: whether the model has zeros of an earlier round, which have to stay.

        Raises:
            RecipeError: these units cannot be exchanged, or not in this model.
        """
        if not isinstance(candidates, Weights) or isinstance(candidates.unit, NM):
            raise RecipeError(
                f"regrow={self.name!r} needs masks of free units.",
                why="what is cut is gone, and an n:m pattern has its own places",
                hint="Use granularity element, vector, kernel or block.",
            )
        if earlier:
            raise RecipeError(
                f"regrow={self.name!r} would bring back weights that an earlier round has removed.",
                why="this model was pruned with masks before, and the plan that leads to it says that they are zero",
                hint="Prune without regrow, or begin with copy.deepcopy(model), which knows of no earlier round.",
            )

    def share(self, time: float) -> float:
        """Share of the kept units that is exchanged.

        Args:
            time: share of the time from `begin` to `end` that is gone.

        Source:
            Evci et al., "Rigging the Lottery", 2020, section 3 (cosine annealing after Dettmers and Zettlemoyer, 2019).
        """
        return self.fraction / 2 * (1 + math.cos(math.pi * time))

    @abstractmethod
    def wish(self, group: Group, gradients: Mapping[str, Tensor], generator: Generator) -> Tensor:
        """How much every unit should come back, float32 of the group's shape; only masked ones are asked."""


REGROWTH: Registry[type[Regrowth]] = Registry("regrowth", "rules of regrowth")
R = TypeVar("R", bound=Regrowth)
names = REGROWTH.names


def register(cls: type[R]) -> type[R]:
    """Class decorator: make a rule known under its name."""
    return REGROWTH.register(cls.name)(cls)


def regrowth_of(spec: str | Mapping[str, object] | Regrowth) -> Regrowth:
    """A rule by name, by {"name": ..., options}, or as it is.

    Raises:
        RecipeError: an unknown name or option.
    """
    if isinstance(spec, Regrowth):
        return spec
    choice = Named.of(spec)
    return REGROWTH.build(choice.name, choice.options)
