"""What a check of the contract works with: a criterion, scenes for it, and a way to say that it does not apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from secateur.criteria.base import Criterion
from secateur.errors import SecateurError
from secateur.testing.scenes import Scene, SceneMaker, tiny_scene
from secateur.testing.tools import require

Factory = Callable[[], Criterion]

KINDS = ("channel", "neuron", "element", "vector", "kernel", "block", "n:m", "expert", "layer")


class NotApplicable(Exception):
    """The check says nothing about this criterion; the message says why."""


class Stage:
    """What a check works with.

    Args:
        factory: makes the criterion.
        make_scene: granularity -> a fresh scene.
        kinds: granularities that `make_scene` knows.
    """

    def __init__(self, factory: Factory, make_scene: SceneMaker, kinds: tuple[str, ...]) -> None:
        self.factory, self.scene = factory, make_scene
        self.criterion = factory()
        known = self.criterion.granularities
        self.kinds = [kind for kind in kinds if "any" in known or kind in known]
        require(bool(self.kinds), f"no scene for granularities {known}: pass make_scene and kinds")

    @property
    def scored(self) -> Iterator[str]:
        """Granularities whose scene the criterion does not refuse; the first must be among them."""
        return (kind for kind, _, _ in self.scores())

    def scores(self) -> Iterator[tuple[str, Scene, dict[str, Tensor]]]:
        """Granularity, scene and scores of everything that is `scored`."""
        for kind in self.kinds:
            scene = self.scene(kind)
            try:
                scores = self.score(scene)
            except SecateurError:
                # A criterion may refuse a scene, for example neurons without a norm, but not its first one.
                require(kind != self.kinds[0], f"{kind} is refused")
                continue
            yield kind, scene, scores

    @property
    def main(self) -> Scene:
        """A fresh scene of the first granularity."""
        return self.scene(self.kinds[0])

    def score(self, scene: Scene, **changes: object) -> dict[str, Tensor]:
        """Scores of a fresh criterion."""
        return self.factory().score(scene.context(**changes))

    def needs(self, word: str) -> bool:
        """Whether the criterion needs "data", "labels", ..."""
        return word in self.criterion.needs

    def only_if(self, applies: bool, why: str) -> None:
        """Leave the check if it does not apply."""
        if not applies:
            raise NotApplicable(why)


@dataclass(frozen=True)
class Check:
    """One property of all criteria; call it with a factory.

    Args:
        name: what must hold, in words.
        body: raises AssertionError if it does not, NotApplicable if it says nothing.
    """

    name: str
    body: Callable[[Stage], None]

    def __call__(self, factory: Factory, *, make_scene: SceneMaker = tiny_scene, kinds: tuple[str, ...] = KINDS) -> str:
        """Run the check.

        Args:
            factory: makes the criterion; its class will do where every option has a default.
            make_scene: granularity -> fresh scene, for criteria that need a model of their own.
            kinds: granularities that `make_scene` knows; the first one that fits is used most.

        Returns:
            "" if it holds, or why it says nothing about this criterion.

        Raises:
            AssertionError: it does not hold.
        """
        try:
            self.body(Stage(factory, make_scene, kinds))
        except NotApplicable as reason:
            return str(reason)
        return ""

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


CHECKS: list[Check] = []


def check(name: str) -> Callable[[Callable[[Stage], None]], Check]:
    """Decorator: add a check to `CHECKS`."""

    def add(body: Callable[[Stage], None]) -> Check:
        CHECKS.append(Check(name, body))
        return CHECKS[-1]

    return add
