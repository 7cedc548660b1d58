"""How much has to go for a latency: a bisection over models that are made and timed, then a line through all looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import ceil
from statistics import median

import numpy as np
from torch import nn

from secateur.amounts.order import RemovalOrder, removals_for
from secateur.errors import TargetError
from secateur.measure.latency import latency
from secateur.types import Example

ROUNDS, WARMUP = 15, 3  # of one look at one model
MARGIN = 0.01  # of the limit: aimed at so much below it, so that what is measured again keeps it and is close to it
LOOKS = 12  # after the bisection, each where the line through those before it crosses what is aimed at
NEAR = 0.1  # looks so close to the aim, as a share of it, make the line: further away the curve is none
CONFIRM, ATTEMPTS = 6, 6  # looks at a result whose first ones miss the limit, and results that are tried


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

    def share(self, cut: nn.Module) -> float:
        """What a model takes of the time of the model as it came."""
        found = latency({"whole": self.model, "cut": cut}, self.example, rounds=ROUNDS, warmup=WARMUP)
        self._whole.append(found["whole"].median)
        ratio = found["cut"].ratio
        assert ratio is not None
        return ratio[0]


class Looks:
    """Every look at every prefix of a removal order; no look alone decides anything.

    Args:
        make: length of the prefix -> the model without it.
        counts: length of the prefix -> something hashable, equal for equal models.
        limit: milliseconds.
        watch: measures.
    """

    def __init__(
        self, make: Callable[[int], nn.Module], counts: Callable[[int], object], limit: float, watch: Stopwatch
    ) -> None:
        self.make, self.counts, self.limit, self.watch = make, counts, limit, watch
        self._steps: dict[object, int] = {counts(0): 0}  # of models that are equal the first that was looked at
        self.shares: dict[int, list[float]] = {0: [1.0]}

    @property
    def aim(self) -> float:
        """The share that is looked for; it moves with what the model as it came takes."""
        return self.limit * (1 - MARGIN) / self.watch.whole

    def of(self, step: int) -> list[float]:
        """The shares that looks at a prefix, or at one with an equal model, have found."""
        return self.shares.get(self._steps.get(self.counts(step), step), [])

    def look(self, step: int) -> None:
        """Look once more at a prefix, or at the one whose model is equal."""
        step = self._steps.setdefault(self.counts(step), step)
        # The model as it came is what the others are compared with: it needs no look.
        self.shares.setdefault(step, []).append(self.watch.share(self.make(step)) if step else 1.0)

    def milliseconds(self, step: int) -> float:
        """What a prefix takes by all looks at it: one is taken where there is none."""
        if not self.of(step):
            self.look(step)
        return median(self.of(step)) * self.watch.whole

    def crossing(self) -> int:
        """The prefix at which time crosses the aim, by all looks together.

        The line of Theil and Sen (Sen, 1968: the median of the slopes of all pairs) through the looks near the aim,
        followed no further than it is long, and kept between looks that are clearly on either side. Where it is none,
        straight between the two around the aim, of shares as if a longer prefix never took more than a shorter one.
        """
        aim, middles = self.aim, {step: median(self.shares[step]) for step in sorted(self.shares)}
        looks = [(step, share) for step, shares in self.shares.items() for share in shares]
        near = sorted((step, share) for step, share in looks if abs(share / aim - 1) < NEAR)
        line = _line(near)
        if line is None:
            falling = np.minimum.accumulate(list(middles.values()))
            return ceil(float(np.interp(-aim, -falling, list(middles))))
        slope, start = line
        first, last = near[0][0], near[-1][0]
        slower = max((step for step, share in middles.items() if share >= aim * (1 + NEAR)), default=0)
        faster = [step for step, share in middles.items() if step > slower and share <= aim * (1 - NEAR)]
        low, high = max(slower, 2 * first - last), min(*faster, max(middles), 2 * last - first)
        return max(min(ceil((aim - start) / slope), high), low)

    def keeps(self, step: int) -> bool:
        """Whether a prefix keeps the limit, as the line says; a look that says no is not the last one."""
        while self.milliseconds(step) > self.limit and len(self.of(step)) < CONFIRM:
            self.look(step)
        return self.milliseconds(step) <= self.limit

    def after(self, step: int) -> int:
        """Where to go on from a prefix that does not keep the limit: towards the next that did, half of the way."""
        kept = [s for s in self.shares if s > step and self.milliseconds(s) <= self.limit]
        return (step + min(kept, default=step + 1) + 1) // 2


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """Slope and start of the line of Theil and Sen; None where it does not fall, or nothing says how it goes."""
    slopes = [(y - v) / (x - u) for (u, v), (x, y) in combinations(points, 2) if x != u]
    slope = median(slopes) if slopes else 0.0
    return (slope, median(y - slope * x for x, y in points)) if slope < 0 else None


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
        TargetError: the limit cannot be reached, or no result keeps it when it is looked at again.

    Cost: log2(units) + `LOOKS` models, and up to `CONFIRM` looks more at a result whose first ones miss the limit; each
    is copied and run in turns with the original for `ROUNDS` rounds.
    """
    looks = Looks(make, counts, limit, watch)
    removals_for(order, looks.milliseconds, limit, "latency_ms", margin=MARGIN)
    for _ in range(LOOKS):
        looks.look(looks.crossing())
    step = looks.crossing()
    for _ in range(ATTEMPTS):
        if looks.keeps(step):
            return step
        crossing = looks.crossing()
        step = min(crossing if crossing > step else looks.after(step), len(order.group))
    raise TargetError(
        f"The target latency_ms <= {limit:g} was reached once but does not hold.",
        why="the machine's latency varies more than the cut changes it",
        hint="Ask for a little more time, or measure on an idle machine.",
    )
