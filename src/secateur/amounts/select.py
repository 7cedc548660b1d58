"""Scores and an amount in, keep masks out: exact counts and a total order, whatever the ties.

Units are removed in the order (score, name of the group, flat index). No quantile is ever involved.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.amounts.allocate.base import allocate, apportion, require_reachable, round_half_up
from secateur.errors import InputError, RecipeError
from secateur.kinds.weights.granularity import STRUCTURAL, Granularity, is_within, names, parse
from secateur.kinds.weights.nm import NM, keep_pattern
from secateur.model.tensors import require_finite
from secateur.registry import suggestion
from secateur.types import Group, Kept

Scores = Mapping[str, Tensor]
Scope = str | Mapping[str, Sequence[str]]


def select(
    scores: Scores,
    *,
    sparsity: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    scope: Scope = "global",
    allocation: str | None = None,
    granularity: str | Mapping[str, Any] | Granularity | None = None,
    min_keep: int = 0,
    protected: Collection[str] = (),
    groups: Sequence[Group] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Kept:
    """Decide which units are kept.

    Exactly one of sparsity, count and threshold says how much goes; an n:m pattern says it by itself. Of
    equal scores the unit with the smaller (name, flat index) goes first, so all-equal scores are pruned
    exactly too. Units that are zero already go before all others where scores are magnitudes.

    Args:
        scores: group name -> scores, higher = keep; any shape and floating dtype.
        sparsity: fraction of the units to remove, in [0, 1); of n units that are round(sparsity * n), a half
            rounded up.
        count: units to remove in all.
        threshold: remove every unit with a score below it. No count is promised.
        scope: who competes with whom. "global": all units. "local": the units of each group, each at the
            same sparsity. "row": the units of each row of a score of at least two dimensions. A mapping
            set name -> name patterns: each set, the first that matches a group counts.
        allocation: how a global amount is spread: "global" (default), "uniform", "erk", "lamp".
        granularity: only a pattern such as "2:4" makes a difference: the n highest scores of each m
            consecutive ones along the input dimension stay, and so does the tail that m does not divide.
        min_keep: units that stay in each group, with scope "row" in each row. Where that binds, the next
            units go instead: of the whole ranking, or with separate scopes of the other groups in proportion
            to their size. Rows do not stand in for each other.
        protected: names of groups, or of modules that hold them, with shell wildcards. They stay whole and
            are not counted.
        groups: the groups that were scored; tells which dimension is the input in layers that keep their
            weight as [in, out] (ConvTranspose, Conv1D of transformers). Without it [out, in, ...] is assumed.
        shapes: group name -> shape of its weight, for allocation "erk" where scores are not per element.

    Returns:
        group name -> bool tensor of the score's shape on its device, True = keep; a dict that also holds the groups
        of the scores, so that `mask_model` and `plan(keep=...)` take it for every granularity.

    Raises:
        RecipeError: contradicting or unknown arguments, sparsity outside [0, 1).
        TargetError: more units to remove than may be removed; names the reachable range.
        NonFiniteError: a score is NaN or infinite.

    Cost:
        Linear in the number of units (a selection, no sort). Memory: about three times the scores.

    Source:
        Han et al. 2015 for the threshold form; the total order is ours.

    Example:
        >>> select({"w": torch.tensor([3.0, 2.0, 1.0, 5.0])}, sparsity=0.5)
        {'w': tensor([ True, False, False,  True])}
    """
    free = _free(scores, protected)
    allocation = None if allocation == "global" else allocation
    axes = {group.name: group.attributes for group in groups or getattr(scores, "groups", ())}
    pattern = _pattern(granularity)
    amounts = {"sparsity": sparsity, "count": count, "threshold": threshold}
    _whole("min_keep", min_keep)
    floors = {name: min(min_keep, score.numel()) for name, score in free.items()}
    if pattern is not None:
        _only_pattern(pattern, amounts, plain=scope == "global" and allocation is None and min_keep == 0)
        dims = {name: int(axes.get(name, {}).get("in_dim", 1)) for name in free}
        kept = {name: keep_pattern(s, pattern.n, pattern.m, dim=dims[name]) for name, s in free.items()}
    else:
        _one_amount(amounts)
        if allocation is not None and (scope != "global" or threshold is not None):
            hint = 'leave scope at "global", and say sparsity or count'
            raise RecipeError(f"allocation={allocation!r} spreads a global sparsity or count", hint=hint)
        if threshold is not None:
            kept = _above(free, threshold, floors)
        elif scope == "row":
            dims = {name: int(axes.get(name, {}).get("out_dim", 0)) for name in free}
            kept = _rows(free, sparsity, count, min_keep, dims)
        elif allocation is not None:
            spread = allocate(free, shapes, name=allocation, sparsity=sparsity, count=count, min_keep=min_keep)
            if spread.removed is None:
                whole = [list(free)]
                kept = _pools(spread.scores, whole, _removed(free, whole, sparsity, count, floors), floors)
            else:
                each = [[name] for name in spread.removed]
                kept = _pools(spread.scores, each, list(spread.removed.values()), floors)
        else:
            pools = _competitors(free, scope)
            kept = _pools(free, pools, _removed(free, pools, sparsity, count, floors), floors)
    everything = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    known = groups or getattr(scores, "groups", ())
    return Kept(everything | kept, known)


def _removed(
    scores: Scores,
    pools: Sequence[Sequence[str]],
    sparsity: float | None,
    count: int | None,
    floors: Mapping[str, int],
) -> list[int]:
    """Units to remove from each pool of competitors."""
    sizes = [sum(scores[name].numel() for name in pool) for pool in pools]
    limits = [size - sum(floors[name] for name in pool) for pool, size in zip(pools, sizes, strict=True)]
    if sparsity is not None:
        wanted = [round_half_up(sparsity, size) for size in sizes]
        if all(w <= limit for w, limit in zip(wanted, limits, strict=True)):
            return wanted
        count = sum(wanted)
    require_reachable(count or 0, sum(limits), sum(sizes))
    return apportion(sizes, count or 0, limits)


def lowest(values: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest values of a vector; of equal ones the earlier.

    Args:
        values: finite or +inf, shape (n,).
        count: 0 to n.

    Returns:
        bool tensor of shape (n,) with exactly `count` True.

    Example:
        >>> lowest(torch.tensor([1.0, 0.0, 1.0, 1.0]), 3)
        tensor([ True,  True,  True, False])
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    border = values.kthvalue(count).values
    marked = values < border
    # The border value itself: as many of its ties as are still missing, in order.
    ties = torch.nonzero(values == border).flatten()
    marked[ties[: count - int(marked.sum())]] = True
    return marked


def _lowest_of_rows(matrix: Tensor, count: int) -> Tensor:
    if count == 0 or matrix.numel() == 0:
        return torch.zeros_like(matrix, dtype=torch.bool)
    border = matrix.kthvalue(count, dim=1, keepdim=True).values
    below, ties = matrix < border, matrix == border
    missing = count - below.sum(1, keepdim=True)
    return below | (ties & (ties.cumsum(1) <= missing))


def _pools(
    scores: Scores, pools: Sequence[Sequence[str]], removed: Sequence[int], floors: Mapping[str, int]
) -> dict[str, Tensor]:
    keep: dict[str, Tensor] = {}
    for pool, count in zip(pools, removed, strict=True):
        ordered = sorted(pool)
        dtype = torch.float64 if any(scores[n].dtype == torch.float64 for n in pool) else torch.float32
        flat = [_with_floor(scores[name].flatten().to("cpu", dtype), floors[name]) for name in ordered]
        marked = lowest(torch.cat(flat) if len(flat) > 1 else flat[0], count)
        for name, part in zip(ordered, torch.split(marked, [f.numel() for f in flat]), strict=True):
            keep[name] = ~part.view(scores[name].shape).to(scores[name].device)
    return keep


def _with_floor(flat: Tensor, floor: int) -> Tensor:
    """The `floor` units that would go last get +inf, so that they stay."""
    if floor == 0:
        return flat
    return torch.where(lowest(flat, flat.numel() - floor), flat, torch.inf)


def _above(scores: Scores, threshold: float, floors: Mapping[str, int]) -> dict[str, Tensor]:
    return {
        name: _with_floor(score.flatten(), floors[name]).view(score.shape) >= threshold
        for name, score in scores.items()
    }


def _rows(
    scores: Scores, sparsity: float | None, count: int | None, min_keep: int, dims: Mapping[str, int]
) -> dict[str, Tensor]:
    matrices: dict[str, Tensor] = {}
    for name, score in scores.items():
        if score.dim() < 2:
            raise RecipeError(
                f'scope "row" needs scores with two dimensions; {name!r} has shape {tuple(score.shape)}',
                hint='use scope="local"',
            )
        matrices[name] = score.movedim(dims[name], 0).flatten(1)
    heights = {name: matrix.shape[0] for name, matrix in matrices.items()}
    limits = [matrix.numel() - min(min_keep, matrix.shape[1]) * matrix.shape[0] for matrix in matrices.values()]
    if sparsity is not None:
        each = [round_half_up(sparsity, matrix.shape[1]) * matrix.shape[0] for matrix in matrices.values()]
    else:
        each = apportion([m.numel() for m in matrices.values()], count or 0, limits)
    keep = {}
    for (name, matrix), total, limit in zip(matrices.items(), each, limits, strict=True):
        require_reachable(total, limit, matrix.numel())
        base, more = divmod(total, heights[name]) if heights[name] else (0, 0)
        marked = torch.cat([_lowest_of_rows(matrix[:more], base + 1), _lowest_of_rows(matrix[more:], base)])
        wide = scores[name].movedim(dims[name], 0).shape
        keep[name] = ~marked.view(wide).movedim(0, dims[name]).contiguous()
    return keep


def _free(scores: Scores, protected: Collection[str]) -> dict[str, Tensor]:
    if isinstance(protected, str):
        raise RecipeError(f"protected={protected!r} is one word", hint=f"write a list: [{protected!r}]")
    for word in protected:
        if not any(is_within(name, [word]) for name in scores):
            raise RecipeError(f"protected: {word!r} matches no group", hint=suggestion(word, scores))
    free = {}
    for name, score in scores.items():
        if not isinstance(score, Tensor) or not score.is_floating_point():
            raise InputError(f"the score of {name!r} is not a tensor of floating-point numbers")
        require_finite(score, name, what="score")
        if not is_within(name, protected):
            free[name] = score.detach().to(torch.promote_types(score.dtype, torch.float32))
    if not free:
        raise InputError("there are no units to select from", hint="is every layer protected, or of another kind?")
    return free


def _competitors(scores: Scores, scope: Scope) -> list[list[str]]:
    if scope == "global":
        return [list(scores)]
    if scope == "local":
        return [[name] for name in scores]
    if isinstance(scope, str):
        raise RecipeError(f"scope={scope!r} is not known", hint=suggestion(scope, ["global", "local", "row"]))
    sets: dict[str, list[str]] = {key: [] for key in scope}
    for name in scores:
        key = next((key for key, patterns in scope.items() if is_within(name, patterns)), None)
        if key is None:
            raise RecipeError(f"scope: no set holds {name!r}", hint='add one with the pattern "*", or protect it')
        sets[key].append(name)
    _no_empty_set(sets)
    return list(sets.values())


def _no_empty_set(sets: Mapping[str, Iterable[str]]) -> None:
    for key, members in sets.items():
        if not members:
            raise RecipeError(f"scope: the patterns of set {key!r} match nothing that is left to them")


def _pattern(granularity: str | Mapping[str, Any] | Granularity | None) -> NM | None:
    if granularity is None or granularity in STRUCTURAL or granularity in names():
        return NM() if granularity == NM.name else None
    parsed = parse(granularity)
    return parsed if isinstance(parsed, NM) else None


def _only_pattern(pattern: NM, amounts: Mapping[str, float | None], *, plain: bool) -> None:
    implied = 1 - pattern.n / pattern.m
    given = {key: value for key, value in amounts.items() if value is not None}
    if any(key != "sparsity" or not math.isclose(value, implied) for key, value in given.items()) or not plain:
        raise RecipeError(
            f"{pattern.n}:{pattern.m} leaves nothing else to choose: it removes {implied:g} of each line",
            hint="leave out sparsity, count, threshold, scope, allocation and min_keep",
        )


def _one_amount(amounts: Mapping[str, float | None]) -> None:
    given = [key for key, value in amounts.items() if value is not None]
    if len(given) != 1:
        raise RecipeError(
            f"exactly one of sparsity, count and threshold is needed, not {len(given)}",
            hint="for example sparsity=0.5",
        )
    _whole("count", amounts["count"] or 0)
    if isinstance(amounts["threshold"], bool) or not math.isfinite(amounts["threshold"] or 0.0):
        raise RecipeError(f"threshold={amounts['threshold']!r} is not a finite number")


def _whole(option: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RecipeError(f"{option}={value!r} is not a whole number of at least 0")
