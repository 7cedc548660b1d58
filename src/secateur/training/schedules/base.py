"""What every schedule is: how sparse a model has to be at every optimizer step, exact at both ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar, cast

from secateur.errors import RecipeError
from secateur.registry import Registry

Shape = Callable[[float], float]  # share of the time gone -> share of the way gone, both in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Sparsity as a function of the optimizer step: `initial` before `begin`, exactly `final` from `end` on.

    Steps are steps of the *optimizer* (several batches each where gradients are accumulated), counted from 0. A
    subclass says what lies between the ends (`between`); options of its own are further fields.

    Args:
        final: sparsity from `end` on, in [0, 1).
        initial: sparsity before `begin`, at most `final`.
        begin: step of the first update.
        end: step of the last update; it takes place whether `every` divides the span or not.
        every: steps between updates.

    Raises:
        RecipeError: a number out of range.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    final: float
    initial: float = 0.0
    begin: int = 0
    end: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 0 <= self.initial <= self.final < 1:
            raise RecipeError(
                f"a schedule from sparsity {self.initial:g} to {self.final:g}",
                hint="sparsity rises within [0, 1): 0 <= initial <= final < 1",
            )
        for name, least in (("begin", 0), ("end", self.begin), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(f"{name}={value!r} of a schedule", hint=f"a whole number of at least {least}")

    def at(self, step: int) -> float:
        """Sparsity at a step: what masks have to hold once that step is done.

        Args:
            step: number of optimizer steps that are done.

        Example:
            >>> from secateur.training.schedules import Cubic
            >>> [round(Cubic(final=0.9, end=4).at(step), 4) for step in range(6)]
            [0.0, 0.5203, 0.7875, 0.8859, 0.9, 0.9]
        """
        if step >= self.end:
            return self.final
        if step < self.begin:
            return self.initial
        # Rounding must not lead past the ends, or a last update would have to give something back.
        return min(max(self.between((step - self.begin) / (self.end - self.begin)), self.initial), self.final)

    def due(self, step: int) -> bool:
        """Whether masks are chosen anew after so many optimizer steps."""
        if not self.begin <= step <= self.end:
            return False
        return step == self.end or (step - self.begin) % self.every == 0

    def updates(self) -> Iterator[int]:
        """The steps of all updates, ascending; the last one is `end`."""
        return (step for step in range(self.begin, self.end + 1) if self.due(step))

    @abstractmethod
    def between(self, time: float) -> float:
        """Sparsity after a share of the time from `begin` to `end`, in [0, 1)."""


class Stepwise(Schedule):
    """A schedule of a few cuts, equally far apart: the first at `begin`, the last at `end`.

    `every` is not asked: a subclass has a number of cuts instead, and says how sparse the model is after each.
    """

    @property
    @abstractmethod
    def cuts(self) -> int:
        """How many cuts there are."""

    @abstractmethod
    def after(self, cut: int) -> float:
        """Sparsity after a cut, counted from 1."""

    def between(self, time: float) -> float:
        """What the last cut has left."""
        # Two cuts may fall into one step where the span is short; the later one counts.
        return self.after(1 + int(time * (self.cuts - 1) + 1e-9))

    def due(self, step: int) -> bool:
        """At the cuts."""
        if step == self.begin or step == self.end:
            return True
        return self.begin < step < self.end and self.at(step) != self.at(step - 1)


SCHEDULES: Registry[type[Schedule]] = Registry("schedule", "schedules")
S = TypeVar("S", bound=Schedule)
names = SCHEDULES.names
_ENDS = tuple(field.name for field in fields(Schedule))


def register(cls: type[S]) -> type[S]:
    """Class decorator: make a schedule known under its name."""
    return SCHEDULES.register(cls.name)(cls)


def schedule_of(
    spec: str | Mapping[str, object] | Schedule | Shape,
    *,
    final: float,
    initial: float = 0.0,
    begin: int = 0,
    end: int = 0,
    every: int = 1,
) -> Schedule:
    """A schedule from what users write.

    Args:
        spec: a name, {"name": ..., options}, a `Schedule` (of which the form and its options are taken, and the ends
            given here), or a callable: share of the time gone -> share of the way gone, both from 0 to 1.
        final: sparsity from `end` on.
        initial: sparsity before `begin`.
        begin: step of the first update.
        end: step of the last update.
        every: steps between updates.

    Raises:
        RecipeError: an unknown name or option, or a number out of range.

    Example:
        >>> schedule_of("linear", final=0.8, end=4).at(1)
        0.2
        >>> schedule_of(lambda time: time**2, final=0.8, end=4).at(2)
        0.2
    """
    ends = {"final": final, "initial": initial, "begin": begin, "end": end, "every": every}
    if isinstance(spec, Schedule):
        own = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in _ENDS}
        return type(spec)(**own, **ends)  # type: ignore[arg-type]
    if isinstance(spec, str):
        spec = {"name": spec}
    if isinstance(spec, Mapping):
        options = {key: value for key, value in spec.items() if key != "name"}
        return SCHEDULES.build(str(spec.get("name")), {**options, **ends})
    if not callable(spec):
        raise RecipeError(f"schedule={spec!r} is no schedule", hint=f"one of {', '.join(names())}, or a callable")
    return SCHEDULES.find("custom")(shape=spec, **cast(dict[str, object], ends))  # type: ignore[call-arg, arg-type]
