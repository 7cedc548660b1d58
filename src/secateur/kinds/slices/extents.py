"""How numbers grow with the width that they are summed over: what tells a mean from a scale and from an offset.

A sum over a dimension grows with its size, a norm with the root of it, a sum over its size not at all. What does not
grow has a meaning over what is kept: a mean, a variance, a norm per element. What still grows, or never did and was
divided by a width, is another number once units are gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NEAR = 1e-5  # of logarithms; numbers in single precision are as near as that
OUTLET = (1.0, -1.0, 0.5, -0.5)  # powers of which a sum may be divided by one less than it has terms


@dataclass(frozen=True)
class Extent:
    """Powers of widths.

    Args:
        powers: (size before the cut, size after it) -> the power of the size that a number grows with.
        number: logarithm of what plain numbers of the code have brought in, before the cut against after it.
    """

    powers: Mapping[tuple[int, int], float] = field(default_factory=dict)
    number: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.powers) or abs(self.number) > NEAR

    def __mul__(self, other: Extent) -> Extent:
        widths = {*self.powers, *other.powers}
        found = {w: self.powers.get(w, 0.0) + other.powers.get(w, 0.0) for w in widths}
        return Extent({w: p for w, p in found.items() if p}, self.number + other.number)

    def __pow__(self, power: float) -> Extent:
        return Extent({w: p * power for w, p in self.powers.items() if power}, self.number * power)

    def like(self, other: Extent) -> bool:
        """Whether two numbers grow alike."""
        return self.powers == other.powers and abs(self.number - other.number) <= NEAR

    def settled(self) -> Extent:
        """Nothing, where numbers of the code have taken away just what sums have brought; else the same."""
        if not self.powers or abs(self.number) <= NEAR:
            return self
        left = self.number + sum(p * math.log(before / after) for (before, after), p in self.powers.items())
        if abs(left) <= NEAR:
            return Extent()
        for width, power in self.powers.items():
            rest = Extent({w: p for w, p in self.powers.items() if w != width})
            for part in _parts(*width, power):
                if abs(self.number + rest.total() + part[0]) <= NEAR:
                    return Extent({**rest.powers, **({width: part[1]} if part[1] else {})})
        return self

    def total(self) -> float:
        """Logarithm of how much sums have brought."""
        return sum(p * math.log(before / after) for (before, after), p in self.powers.items())


def _parts(before: int, after: int, power: float) -> Sequence[tuple[float, float]]:
    """Ways to divide by a width: by one less (a variance), and once of several times (the square of a sum)."""
    found: list[tuple[float, float]] = []
    if after > 1 and power in OUTLET:
        found.append((power * math.log((before - 1) / (after - 1)), 0.0))
    if abs(power) >= 2:
        once = math.copysign(1.0, power)
        found.append((once * math.log(before / after), power - once))
    return found


def grown(before: int, after: int, power: float = 1.0) -> Extent:
    """The extent of a sum over a dimension, or of a power of it."""
    return Extent({(before, after): power}) if 0 < after < before else Extent()


def brought(before: float, after: float) -> Extent | None:
    """The extent of a plain number of the code, which is another one after the cut; None where it tells nothing."""
    if before == after:
        return Extent()
    if not before > 0 or not after > 0 or math.isinf(before) or math.isinf(after):
        return brought(-before, -after) if before < 0 and after < 0 else None
    return Extent(number=math.log(before / after))
