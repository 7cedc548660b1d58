"""Structured targets: one ordered list of removals serves every budget.

Units are ordered once, by what they are worth. A plan is a prefix of that list, so a smaller budget always removes a
superset of what a larger one removes, and the exact prefix for any monotone cost is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import RecipeError, TargetError
from secateur.registry import suggestion
from secateur.shown import written


@dataclass(frozen=True, eq=False)
class RemovalOrder:
    """The units in the order in which they go.

    Args:
        names: group names, sorted.
        group: [n] position of each removal's group in `names`.
        unit: [n] the unit's number in its group.
        sizes: units of each group.
        round_to: kept counts of each group are rounded up to multiples of this (never above the group's size).
    """

    names: tuple[str, ...]
    group: npt.NDArray[np.int64]
    unit: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    round_to: npt.NDArray[np.int64]

    def kept_counts(self, removals: int) -> dict[str, int]:
        """How many units every group keeps after the first `removals` removals, rounded."""
        gone = np.bincount(self.group[:removals], minlength=len(self.names))
        kept = self.sizes - gone
        rounded = -(-kept // self.round_to) * self.round_to  # upwards: a unit too many is kept rather than removed
        return {n: int(min(r, s)) for n, r, s in zip(self.names, rounded, self.sizes, strict=True)}

    def keep(self, removals: int) -> dict[str, Tensor]:
        """Group name -> bool [size], True = kept; within a group the units that go are the first of the list."""
        counts = self.kept_counts(removals)
        listed = self.group[: max(removals, 0)]
        by_group = np.argsort(listed, kind="stable")  # stable: within a group the order of the list stays
        ends = np.cumsum(np.bincount(listed, minlength=len(self.names)))
        out, start = {}, 0
        for i, (name, end) in enumerate(zip(self.names, ends.tolist(), strict=True)):
            mask = np.ones(int(self.sizes[i]), bool)
            gone = int(self.sizes[i]) - counts[name]  # rounding may keep the last ones of the list
            mask[self.unit[by_group[start:end][:gone]]] = False
            out[name] = torch.from_numpy(mask)
            start = end
        return out


def removal_order(
    scores: Mapping[str, Tensor],
    *,
    scope: str = "global",
    min_keep: Mapping[str, int] | int = 1,
    round_to: Mapping[str, int] | int = 1,
) -> RemovalOrder:
    """Order all units by what they are worth; ties by group name, then by number.

    Args:
        scores: group name -> [size] scores, higher = keep.
        scope: "global" ranks by score; "local" by the rank within the group, so all groups shrink alike.
        min_keep: units that stay in every group: the best ones, whatever their score.
        round_to: kept counts are multiples of this.

    Returns:
        the list; every group's best units are not in it.

    Raises:
        RecipeError: another scope.

    Cost: one sort of all units.
    """
    if scope not in ("global", "local"):
        raise RecipeError(f"scope={scope!r} is not known for cuts", hint=suggestion(scope, ["global", "local"]))
    names = tuple(sorted(scores))
    groups, units, keys, sizes = [], [], [], []
    for i, name in enumerate(names):
        score = scores[name].detach().double().flatten().cpu().numpy()
        floor = min_keep if isinstance(min_keep, int) else min_keep.get(name, 1)
        order = np.argsort(score, kind="stable")[: max(len(score) - floor, 0)]
        groups.append(np.full(len(order), i))
        units.append(order)
        # The rank counts from 1: the key is the fraction of its group that is gone once the unit goes. Counted from 0
        # the first unit of every group would come first, and a group of one would be emptied before any other shrinks.
        keys.append(score[order] if scope == "global" else (np.arange(len(order)) + 1) / len(score))
        sizes.append(len(score))
    group, unit = np.concatenate(groups or [np.zeros(0, int)]), np.concatenate(units or [np.zeros(0, int)])
    # Stable: groups stand in the order of their names and units in that of their worth, which settles all ties.
    by_worth = np.argsort(np.concatenate(keys or [np.zeros(0)]), kind="stable")
    steps = [round_to if isinstance(round_to, int) else round_to.get(name, 1) for name in names]
    return RemovalOrder(
        names, group[by_worth], unit[by_worth], np.asarray(sizes, np.int64), np.asarray(steps, np.int64)
    )


def removals_for(
    order: RemovalOrder, cost: Callable[[int], float], limit: float, what: str, *, margin: float = 0.0
) -> int:
    """The shortest prefix of the list whose cost is at most `limit`.

    Args:
        order: from `removal_order`.
        cost: length of the prefix -> cost; falls as units go.
        limit: the target.
        what: the target's name, for the error.
        margin: share of the limit that is aimed below it, where a cost is measured and not counted.

    Raises:
        TargetError: even the whole list does not reach the limit; names the reachable range.

    Cost: log2(units) evaluations of `cost`.
    """
    low, high = 0, len(order.group)
    lowest = cost(high)
    if lowest > limit:
        raise TargetError(
            f"The target {what} <= {written(limit)} cannot be reached.",
            why=f"with everything gone that may go the least is {written(lowest)}; now it is {written(cost(0))}",
            hint="Ask for less, lower min_keep, or see `secateur inspect` for what is locked and why.",
        )
    while low < high:
        middle = (low + high) // 2
        if cost(middle) <= limit * (1 - margin):
            high = middle
        else:
            low = middle + 1
    return low
