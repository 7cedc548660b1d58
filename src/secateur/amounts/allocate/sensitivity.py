"""Groups lose what they can bear: an amount is spread by measured curves of quality against ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.amounts.allocate.base import Allotment, Amounts, register
from secateur.errors import RecipeError

NAME = "sensitivity"
TILT = 1e-3  # of the steepest slope: where curves are flat, groups lose alike and not one of them everything
HINT = "pass allocation=sensitivity(...).allocation(), as secateur.sensitivity gives it"

Numbers = npt.NDArray[np.float64]


@runtime_checkable
class HasAllocation(Protocol):
    """Something that knows how to spread an amount, as what `secateur.sensitivity` returns does."""

    def allocation(self) -> Mapping[str, object]:
        """Name and options, as a recipe writes them."""


Spread = str | Mapping[str, object] | HasAllocation


@register(NAME)
def sensitivity(request: Allotment) -> Amounts:
    """Spread an amount by measured curves; by its name alone it has none.

    Raises:
        RecipeError: always; the curves are options of it.
    """
    raise no_curves()


def no_curves() -> RecipeError:
    """The one error for a name without what it stands for."""
    return RecipeError(f"allocation {NAME!r} needs the curves that were measured", hint=HINT)


@dataclass(frozen=True)
class LossCurve:
    """What is lost of one group's units.

    Args:
        ratios: fractions of them that go, ascending, in (0, 1].
        falls: what is lost at each.
    """

    ratios: tuple[float, ...]
    falls: tuple[float, ...]

    def slopes(self) -> tuple[Numbers, Numbers]:
        """Places in [0, 1] and what one more unit costs there; rising, so that a group's worst units go first.

        The curve is made to rise (what goes costs something, or nothing) and then to bend upwards (its lower convex
        envelope): only then does the best choice of all groups together take units in the order of their slopes.
        """
        x = np.asarray([0.0, *self.ratios])
        y = np.maximum.accumulate(np.asarray([0.0, *self.falls]))
        hull = [0]
        for point in range(1, len(x)):
            while len(hull) > 1 and _slope(x, y, hull[-2], hull[-1]) >= _slope(x, y, hull[-1], point):
                hull.pop()
            hull.append(point)
        ends = list(pairwise(hull))
        return np.asarray([(x[a] + x[b]) / 2 for a, b in ends]), np.asarray([_slope(x, y, a, b) for a, b in ends])


@dataclass(frozen=True)
class Curves:
    """The curves of all groups that may lose units.

    Args:
        by_group: name of the group -> its curve. Groups without one stay whole.

    Source: the trade by equal slopes is Lagrange's (Shoham and Gersho, "Efficient bit allocation for an arbitrary set
    of quantizers", 1988); falls of single layers stand for those of all together, which they are not exactly.
    """

    by_group: Mapping[str, LossCurve]

    def worth(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What removing each unit costs by the curve of its group, in the order of its scores.

        Args:
            scores: group name -> scores, higher = keep; they only order the units within the group.
        """
        slopes = {}
        for name, score in scores.items():
            if name in self.by_group:
                places, found = self.by_group[name].slopes()
                # A curve is of shares: of a wide group one unit is a small one.
                slopes[name] = places, found / max(score.numel(), 1)
        steepest = max((float(found.max()) for _, found in slopes.values()), default=0.0) or 1.0
        return {name: self._of(score, slopes.get(name), steepest) for name, score in scores.items()}

    @staticmethod
    def _of(score: Tensor, slope: tuple[Numbers, Numbers] | None, steepest: float) -> Tensor:
        flat = score.detach().double().flatten().cpu()
        if slope is None:
            return torch.full(score.shape, torch.inf)
        share = (np.arange(flat.numel()) + 0.5) / max(flat.numel(), 1)
        # Between the middles of its pieces a slope rises evenly: the units of one piece would else all be equal.
        cost = np.interp(share, *slope) + TILT * steepest * share
        order = flat.argsort(stable=True)
        return torch.empty_like(flat).scatter_(0, order, torch.from_numpy(cost)).view(score.shape).float()


def spread_of(allocation: Spread) -> tuple[str, Curves | None]:
    """The name of an allocation, and its curves where it has any.

    Args:
        allocation: a name, {"name": ..., options} or an object that gives such a mapping.

    Raises:
        RecipeError: malformed.
    """
    if isinstance(allocation, str):
        return allocation, None
    given = allocation.allocation() if isinstance(allocation, HasAllocation) else allocation
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str):
        raise RecipeError(
            f"allocation={allocation!r} is no choice.", hint="write a name, or {name: ..., option: value}"
        )
    if name != NAME:
        return name, None
    curves = given.get("curves")
    if not isinstance(curves, Sequence) or isinstance(curves, str) or not curves:
        raise no_curves()
    return name, Curves({group: curve for one in curves for group, curve in [_curve(one)]})


def word_of(allocation: Spread) -> str:
    """The name of an allocation, where only names are known.

    Raises:
        RecipeError: it is made of curves.
    """
    name, curves = spread_of(allocation)
    if curves is not None:
        raise RecipeError(
            f"allocation {NAME!r} does not apply to a training that prunes.",
            why="its curves are of the model as it came, and a training moves the weights",
            hint="Use it with a plan, or another allocation here.",
        )
    return name


def _curve(given: object) -> tuple[str, LossCurve]:
    found = given if isinstance(given, Mapping) else {}
    group, ratios, falls = found.get("group"), found.get("ratios"), found.get("falls")
    right = isinstance(group, str) and _numbers(ratios) and _numbers(falls)
    if not right or set(found) != {"group", "ratios", "falls"}:
        raise RecipeError(f"allocation {NAME!r}: {str(given)[:80]} is no curve", hint="write {group, ratios, falls}")
    x, y = tuple(map(float, ratios)), tuple(map(float, falls))  # type: ignore[arg-type]
    rising = all(0 < a <= 1 for a in x) and all(a < b for a, b in pairwise(x))
    if not x or len(x) != len(y) or not rising:
        raise RecipeError(
            f"allocation {NAME!r}: the curve of {group} has the ratios {list(x)} and {len(y)} falls",
            hint="ratios rise, in (0, 1], and each has one fall",
        )
    return str(group), LossCurve(x, y)


def _numbers(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(isinstance(one, (int, float)) and not isinstance(one, bool) and np.isfinite(one) for one in value)


def _slope(x: Numbers, y: Numbers, first: int, last: int) -> float:
    return float((y[last] - y[first]) / (x[last] - x[first]))
