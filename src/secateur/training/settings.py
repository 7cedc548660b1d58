"""What users write for a pruner, as the pruner takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from secateur.amounts import per_pattern
from secateur.errors import RecipeError
from secateur.kinds.base import Candidates
from secateur.kinds.weights.nm import NM
from secateur.registry import real_number
from secateur.request import Target
from secateur.training.schedules import Schedule, schedule_of
from secateur.training.schedules.base import Shape

ScheduleLike = str | Mapping[str, object] | Schedule | Shape
Optimizers = Optimizer | Sequence[Optimizer] | None


def listed_optimizers(optimizer: Optimizers) -> list[Optimizer]:
    """Optimizers as a list, out of the wrappers that some libraries put around them.

    Raises:
        RecipeError: something that is no optimizer.
    """
    given = [] if optimizer is None else [optimizer] if not isinstance(optimizer, (list, tuple)) else list(optimizer)
    found = []
    for one in given:
        # accelerate hands out an object that only calls the real one, whose hooks are the ones that run.
        inner = getattr(one, "optimizer", one)
        if not isinstance(inner, Optimizer):
            raise RecipeError(f"{type(one).__name__} is no optimizer.", hint="Pass the torch optimizer of your loop.")
        found.append(inner)
    return found


def goal_of(sparsity: object, target: object, candidates: Candidates) -> Target:
    """The target, from either of the two ways to give it; an n:m pattern says its own.

    Raises:
        RecipeError: both, none, or a name pattern that matches nothing: not as late as at the first update.
    """
    if sparsity is not None and target is not None:
        raise RecipeError("sparsity= and target= both say how much goes.", hint="Give one of them.")
    unit = getattr(candidates, "unit", None)
    if sparsity is None and target is None and isinstance(unit, NM):
        return Target(sparsity=1 - unit.n / unit.m)
    if sparsity is None and target is None:
        raise RecipeError("There is no amount.", hint="for example sparsity=0.9")
    goal = Target.of({"sparsity": sparsity} if target is None else target)  # type: ignore[dict-item, arg-type]
    apart = goal.per_pattern()
    if apart is not None:
        per_pattern([group.name for group in candidates.groups], apart[1], what=apart[0])
    return goal


def clock(schedule: ScheduleLike, *, final: float, begin: int, end: int | None, every: int, initial: float) -> Schedule:
    """A schedule with its ends; only "one_shot" does without an end.

    Raises:
        RecipeError: an unknown name, a number out of range, or no end.
    """
    made = schedule_of(
        schedule,
        final=final,
        initial=real_number("initial", initial),
        begin=begin,
        end=begin if end is None else end,
        every=every,
    )
    if end is None and made.name != "one_shot":
        raise RecipeError(f"schedule {made.name!r} needs an end.", hint="end=the optimizer step of the last update")
    return made


def asks(target: Target) -> bool:
    """Whether a target on the way asks for anything yet."""
    for what, value in target.given().items():
        amounts = value.values() if isinstance(value, Mapping) else [value]
        whole = 1.0 if what in ("params", "macs") else 0.0
        if any(amount != whole for amount in amounts):
            return True
    return False
