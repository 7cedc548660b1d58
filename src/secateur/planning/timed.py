"""How much has to go for a latency: bisection over models that are made and timed, then a longer look at the result."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from torch import nn

from secateur.amounts.order import RemovalOrder, removals_for
from secateur.errors import TargetError
from secateur.measure.latency import latency
from secateur.types import Example

ROUNDS, WARMUP = 15, 3  # of every measurement while searching; twice as many rounds for the result
MARGIN = 0.015  # of the limit: aimed at so much below it, so that what is measured again keeps it and is close to it
LOOKS = 8  # longer measurements at most, until one lies between the limit and twice the margin below it


class Stopwatch:
    """Milliseconds of models, each timed in turns with the model as it came.

    A machine that is slower for a while slows both, so what is measured is a ratio. Milliseconds are made of it by the
    median of all that the model as it came has taken until then.

    Args:
        model: as it came.
        example: what all of them take.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.model, self.example = model, example
        self._whole: list[float] = []

    @property
    def whole(self) -> float:
        """Milliseconds of the model as it came."""
        if not self._whole:
            self._whole.append(
                latency({"whole": self.model}, self.example, rounds=ROUNDS, warmup=WARMUP)["whole"].median
            )
        return median(self._whole)

    def share(self, cut: nn.Module, rounds: int) -> float:
        """What a model takes of the time of the model as it came."""
        found = latency({"whole": self.model, "cut": cut}, self.example, rounds=rounds, warmup=WARMUP)
        self._whole.append(found["whole"].median)
        ratio = found["cut"].ratio
        assert ratio is not None
        return ratio[0]


def removals_for_latency(
    order: RemovalOrder,
    make: Callable[[int], nn.Module],
    counts: Callable[[int], object],
    limit: float,
    watch: Stopwatch,
) -> int:
    """The prefix of a removal order whose model takes at most so long, and hardly less.

    Args:
        order: what goes, in its order.
        make: length of the prefix -> the model without it.
        counts: length of the prefix -> something hashable, equal for equal models.
        limit: milliseconds of one forward pass.
        watch: measures.

    Raises:
        TargetError: the limit cannot be reached, or no longer measurement keeps it.

    Cost: log2(units) + `LOOKS` models at most, each copied and run with the original for `ROUNDS` or twice as often.
    """
    shares: dict[object, float] = {counts(0): 1.0}

    def quick(step: int) -> float:
        key = counts(step)
        if key not in shares:
            shares[key] = watch.share(make(step), ROUNDS)
        return shares[key] * watch.whole

    long: dict[object, float] = {counts(0): 1.0}

    def look(step: int) -> float:
        key = counts(step)
        if key not in long:
            long[key] = watch.share(make(step), 2 * ROUNDS)
        return long[key] * watch.whole

    step = removals_for(order, quick, limit, "latency_ms", margin=MARGIN)
    return _settled(order, step, look, limit, watch)


def _settled(order: RemovalOrder, step: int, look: Callable[[int], float], limit: float, watch: Stopwatch) -> int:
    """Where longer measurements agree: short ones have misled the bisection now and then, to either side."""
    slow, fast = 0, len(order.group) + 1  # prefixes that take too long, and that keep the limit; the ends are neither
    for _ in range(LOOKS):
        found = look(step)
        if found <= limit:
            fast = step
            if found >= limit * (1 - 2 * MARGIN) or step == slow + 1 or not step:
                break
        else:
            slow = step
        if fast - slow <= 1:
            break
        # Time falls about evenly along the list, so the place that is looked for is about there.
        saved = watch.whole - found
        guess = round(step * (watch.whole - limit * (1 - MARGIN)) / saved) if saved > 0 else (slow + fast) // 2
        step = min(max(guess, slow + 1), fast - 1)
    if fast > len(order.group):
        raise TargetError(
            f"The target latency_ms <= {limit:g} was reached once but does not hold.",
            why="the machine's latency varies more than the cut changes it",
            hint="Ask for a little more time, or measure on an idle machine.",
        )
    return fast
