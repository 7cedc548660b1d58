"""How much is removed from where: the request, the answer, and the arithmetic of exact totals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

from torch import Tensor

from secateur.errors import RecipeError, TargetError
from secateur.registry import Registry


@dataclass(frozen=True, eq=False)
class Allotment:
    """What is to be spread over the groups.

    Args:
        scores: group name -> scores, higher = keep.
        shapes: group name -> shape of the weight that the group prunes.
        count: units to remove, all groups together.
        floors: group name -> units that must stay.
    """

    scores: Mapping[str, Tensor]
    shapes: Mapping[str, Sequence[int]]
    count: int
    floors: Mapping[str, int]

    @property
    def sizes(self) -> dict[str, int]:
        """Units of each group."""
        return {name: score.numel() for name, score in self.scores.items()}

    @property
    def limits(self) -> list[int]:
        """Units that may at most be removed from each group."""
        return [size - self.floors[name] for name, size in self.sizes.items()]


@dataclass(frozen=True, eq=False)
class Amounts:
    """The answer: either a number per group, or scores that may be ranked over all groups.

    Args:
        scores: group name -> scores to select by, higher = keep.
        removed: group name -> units to remove, or None: rank all groups together.
    """

    scores: Mapping[str, Tensor]
    removed: Mapping[str, int] | None = None


Allocator = Callable[[Allotment], Amounts]
ALLOCATIONS: Registry[Allocator] = Registry("allocation", "allocations")
register, names = ALLOCATIONS.register, ALLOCATIONS.names


def allocate(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    name: str = "global",
    sparsity: float | None = None,
    count: int | None = None,
    min_keep: int = 0,
) -> Amounts:
    """Allotment a total over groups.

    Args:
        scores: group name -> scores, higher = keep.
        shapes: group name -> shape of the weight that the group prunes; the shape of the scores if not given.
        name: "uniform", "global", "erk" or "lamp".
        sparsity: fraction of all units to remove, in [0, 1); or
        count: number of units to remove.
        min_keep: units that stay in each group (smaller groups stay whole).

    Returns:
        Amounts whose numbers sum to exactly the total, or None in their place where one ranking of the
        returned scores decides.

    Raises:
        RecipeError: unknown allocation, or not exactly one of sparsity and count.
        TargetError: the total is more than the floors leave; names the reachable range.

    Example:
        >>> import torch
        >>> allocate({"a": torch.ones(4), "b": torch.ones(8)}, name="uniform", count=6).removed
        {'a': 2, 'b': 4}
    """
    allocator = ALLOCATIONS.find(name)
    if (sparsity is None) == (count is None):
        raise RecipeError("say either sparsity or count")
    sizes = {group: score.numel() for group, score in scores.items()}
    total = round_half_up(sparsity, sum(sizes.values())) if count is None and sparsity is not None else count
    known = {group: tuple((shapes or {}).get(group, score.shape)) for group, score in scores.items()}
    floors = {group: min(min_keep, size) for group, size in sizes.items()}
    request = Allotment(scores, known, total or 0, floors)
    require_reachable(request.count, sum(request.limits), sum(sizes.values()))
    return allocator(request)


def round_half_up(sparsity: float, units: int) -> int:
    """Units that a sparsity removes: sparsity * units, a half rounded up, in decimal as it was written.

    Raises:
        RecipeError: sparsity outside [0, 1); one above 1 is taken for a percentage in the hint.

    Example:
        >>> round_half_up(0.7, 45), round_half_up(0.5, 3)
        (32, 2)
    """
    # Not 1: everything gone is no pruning, and `True` would pass as 1. NaN fails both comparisons.
    if isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        percent = 1 < sparsity < 100
        hint = f"a fraction, not a percentage: did you mean {sparsity / 100:g}?" if percent else ""
        raise RecipeError(f"sparsity={sparsity} is outside [0, 1)", hint=hint or "0.5 removes half of the units")
    # In decimal: 0.7 * 45 is 31.5 as it was written, and 31.499999999999996 in binary.
    return int((Decimal(str(sparsity)) * units).to_integral_value(ROUND_HALF_UP))


def require_reachable(count: int, most: int, units: int) -> None:
    """Refuse a total that cannot be removed.

    Raises:
        TargetError: names the reachable range.
    """
    if not 0 <= count <= most:
        # Rounded down: the number that the hint names must itself be reachable.
        highest = math.floor(1e6 * most / units) / 1e6 if units else 0.0
        raise TargetError(
            f"cannot remove {count} of {units} units",
            why=f"what must be kept leaves {most}",
            hint=f"reachable: 0 to {most} units, sparsity 0 to {highest:g}; lower the target or min_keep",
        )


def apportion(
    shares: Sequence[Fraction | int],
    total: int,
    limits: Sequence[int],
    *,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Whole numbers in proportion to shares, between `floors` and `limits`, that sum to exactly `total`.

    What a bound cuts off or adds is shared by the others in proportion. Remainders are rounded by size
    (largest remainder), the earlier first where equal.

    Raises:
        TargetError: the bounds do not leave room for the total.

    Cost:
        At most one pass over the shares per bound that binds.

    Example:
        >>> apportion([1, 1, 2], 8, [9, 1, 9])
        [2, 1, 5]
    """
    lowest = list(floors) if floors is not None else [0] * len(shares)
    require_reachable(total - sum(lowest), sum(limits) - sum(lowest), sum(limits))
    quotas = water_fill(shares, Fraction(total), limits, floors=lowest)
    result = [math.floor(q) for q in quotas]
    # Each remainder is below one, so one unit more for the largest of them never passes a limit, which is whole.
    order = sorted(range(len(quotas)), key=lambda i: (result[i] - quotas[i], i))
    for i in order[: total - sum(result)]:
        result[i] += 1
    return result


def water_fill(
    shares: Sequence[Fraction | int], total: Fraction, limits: Sequence[int], *, floors: Sequence[int]
) -> list[Fraction]:
    """Amounts in proportion to shares, between `floors` and `limits`, that sum to `total`; not rounded.

    Amounts out of bounds are fixed at the bound, on the side that is further out in sum, and the others are
    solved again: an amount once fixed never has to be freed.
    """
    # Fractions, not floats: the amounts sum to exactly the total, whatever the shares.
    fixed: dict[int, Fraction] = {}
    while True:
        free = [i for i in range(len(shares)) if i not in fixed]
        whole = sum((Fraction(shares[i]) for i in free), Fraction(0))
        rate = (total - sum(fixed.values())) / whole if whole else Fraction(0)
        under = {i: Fraction(floors[i]) for i in free if rate * shares[i] < floors[i]}
        over = {i: Fraction(limits[i]) for i in free if rate * shares[i] > limits[i]}
        if not under and not over:
            return [fixed[i] if i in fixed else rate * shares[i] for i in range(len(shares))]
        # One side at a time: what it fixes changes the rate, and amounts on the other side may lie inside again.
        excess = sum(bound - rate * shares[i] for i, bound in (under | over).items())
        fixed |= under if excess >= 0 else {}
        fixed |= over if excess <= 0 else {}
