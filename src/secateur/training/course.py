"""How far a pruning has to be at every step: a target and a schedule, as targets on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from secateur.amounts import round_half_up
from secateur.errors import RecipeError
from secateur.request import Amount, Target
from secateur.training.schedules import Schedule

Whole = Callable[[str], int]  # what the whole model has: "count" (units), "memory_bytes"
NOT_GRADUAL = ("threshold", "latency_ms")


@dataclass(frozen=True, eq=False)
class Course:
    """Targets on the way to a target.

    Args:
        target: what holds from `end` on, exactly as it was given.
        ways: name of a bound (and of a pattern, "" where there is none) -> schedule of the share that is removed.
        whole: size of the model in units of a bound.
    """

    target: Target
    ways: Mapping[tuple[str, str], Schedule]
    whole: Whole

    @classmethod
    def of(cls, target: Target, shape: Schedule, whole: Whole) -> Course:
        """A course whose bounds all follow one schedule.

        Args:
            target: what has to be reached.
            shape: its ends in time and its form; its `final` is replaced by what every bound asks for.
            whole: "count" or "memory_bytes" -> what the whole model has.

        Raises:
            RecipeError: a bound that cannot be walked to in steps.
        """
        ways = {}
        for what, value in target.given().items():
            several = value if isinstance(value, Mapping) else {"": value}
            if what in NOT_GRADUAL or (what == "count" and isinstance(value, Mapping)):
                raise RecipeError(
                    f"target {what!r} cannot be reached step by step.",
                    why="nothing says how much of it half of the way is",
                    hint="Give sparsity (also per name pattern), count, params, macs or memory_bytes.",
                )
            for pattern, amount in several.items():
                final = _removed(what, float(amount), whole)
                ways[what, pattern] = replace(shape, final=final, initial=min(shape.initial, final))
        most = max(way.final for way in ways.values())
        if shape.initial > most:
            raise RecipeError(
                f"initial={shape.initial:g} is more than goes in the end ({most:g})",
                hint="initial is what goes at begin; what is gone does not come back",
            )
        return cls(target, ways, whole)

    @property
    def clock(self) -> Schedule:
        """The schedule that says when; all have the same times."""
        return next(iter(self.ways.values()))

    def at(self, step: int) -> Target:
        """What has to hold after so many optimizer steps."""
        if step >= self.clock.end:
            return self.target
        bounds: dict[str, Amount] = {}
        for what, value in self.target.given().items():
            shares = {pattern: way.at(step) for (name, pattern), way in self.ways.items() if name == what}
            bounds[what] = shares if isinstance(value, Mapping) else self._bound(what, shares[""])
        return Target(**bounds)  # type: ignore[arg-type]

    def _bound(self, what: str, share: float) -> float:
        if what == "sparsity":
            return share
        if what == "count":
            return round_half_up(share, self.whole("count"))
        return 1 - share if what in ("params", "macs") else round((1 - share) * self.whole(what))


def _removed(what: str, amount: float, whole: Whole) -> float:
    """The share that goes in the end."""
    if what == "sparsity":
        return amount
    if what in ("params", "macs"):
        return 1 - amount
    total = whole(what)
    return min(amount, total - 1) / total if what == "count" else max(0.0, 1 - amount / total)
