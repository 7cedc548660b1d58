"""From numbers to places on an axis, and the numbers that are written beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TINY = 1e-300  # below it numbers lose their digits, and halves of them are none


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`.

    Args:
        low, high: its ends, with ``low < high``; both above zero where `log`.
        log: equal factors are equally long.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Sequence[float], *, zero: bool = False, margin: float = 0.05, log: bool = False,
        within: tuple[float, float] = (-math.inf, math.inf),
    ) -> Axis:  # fmt: skip
        """An axis on which all values fit.

        Args:
            values: what is drawn; none at all gives an axis from 0 to 1.
            zero: begin at zero (bars, whose length is read).
            margin: share that is left free at both ends.
            log: a logarithmic axis, which leaves out what is not above zero.
            within: the ends that values of this kind can have: no axis shows 104 %.

        Example:
            >>> Axis.over([2.0, 4.0], margin=0.5)
            Axis(low=1.0, high=5.0, log=False)
        """
        known = [value for value in values if not log or value > TINY]
        if not known:
            return cls(0.1, 1.0, log=True) if log else cls(0.0, 1.0)
        low, high = min(known), max(known)
        if log:
            return cls(low / 1.5, high * 1.5, log=True)
        low = min(low, 0.0) if zero else low
        # One value alone has no spread of its own: half of it on either side says how large it is.
        room = margin * (high - low) if high > low else abs(high) / 2 or 0.5
        ends = max(low - room, within[0]), min(high + room, within[1])
        low, high = (low, ends[1]) if zero and low == 0 else ends
        return cls(low, high if high - low > TINY else low + 1.0)

    def place(self, value: float) -> float:
        """Where a value stands: 0 at the low end, 1 at the high one."""
        if not self.log:
            # Halved first: the ends of an axis may be as far apart as numbers go.
            return (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers on the axis, about as many as asked for."""
        return _powers(self.low, self.high) if self.log else _round(self.low, self.high, most)


def _round(low: float, high: float, most: int) -> list[float]:
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low, high]
    power = 10.0 ** math.floor(math.log10(span / most))
    # 2.5 is left out: its ticks need a digit more than those of 2 and 5.
    step = next(power * one for one in (1, 2, 5, 10, 20) if span / (power * one) <= most)
    if low + step == low or not step:
        return [low, high]
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    every = max(1, len(powers) // 5)
    found = [10.0**power for power in powers][::every]
    if len(found) > 1:
        return found
    # Less than a factor of a hundred: ones, twos and fives; less than of two: what the ends themselves are about.
    lowest = math.floor(math.log10(low))
    between = [float(f"{one}e{lowest + power}") for power in range(3) for one in (1, 2, 5)]
    found = [one for one in between if low <= one <= high]
    return found if len(found) > 1 else [float(f"{low * (high / low) ** part:.2g}") for part in (0.1, 0.9)]
