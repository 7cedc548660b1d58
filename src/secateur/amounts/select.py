"""Scores and an amount in, keep masks out: exact counts and a total order, whatever the ties.

Units are removed in the order (score, name of the group, flat index). No quantile is ever involved, and the scores
are never copied as a whole: what is held besides them are the masks and one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from secateur.amounts.allocate.base import allocate, apportion, require_reachable, round_half_up
from secateur.amounts.border import (
    Chunks,
    assemble,
    at_least_single,
    common_dtype,
    drop_from_rows,
    find_border,
    floored,
    kept_chunks,
)
from secateur.amounts.patterns import per_pattern
from secateur.errors import InputError, RecipeError
from secateur.kinds.weights.granularity import STRUCTURAL, Granularity, is_within, names, parse
from secateur.kinds.weights.nm import NM, keep_pattern
from secateur.model.tensors import require_finite
from secateur.registry import suggestion, whole_number
from secateur.request import check_target, require_patterns
from secateur.types import Group, Kept
from secateur.words import spoken

Scope = str | Mapping[str, Sequence[str]]
Spec = str | Mapping[str, object] | Granularity


@dataclass(frozen=True)
class _Amount:
    """How much goes; exactly one is given."""

    sparsity: float | None = None
    count: int | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class _Rules:
    """Who competes with whom, as `select` was told; `axes` are the attributes of the groups by name."""

    scope: Scope
    allocation: str | None
    min_keep: int
    axes: Mapping[str, Mapping[str, object]]
    shapes: Mapping[str, Sequence[int]] | None

    def dimension(self, name: str, which: str, default: int) -> int:
        """The dimension of a score that is the output ("out_dim") or the input ("in_dim") of its layer."""
        found = self.axes.get(name, {}).get(which, default)
        assert isinstance(found, int)
        return found


@spoken()
def select(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float | Mapping[str, float] | None = None,
    count: int | Mapping[str, int] | None = None,
    threshold: float | Mapping[str, float] | None = None,
    scope: Scope = "global",
    allocation: str | None = None,
    granularity: Spec | None = None,
    min_keep: int = 0,
    protect: Collection[str] = (),
    groups: Sequence[Group] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Kept:
    """Decide which units are kept.

    Exactly one of sparsity, count and threshold says how much goes; an n:m pattern says it by itself. Each may
    be a mapping from name patterns to amounts: the groups of one pattern are then selected as if they were the
    whole model, so every pattern meets its own exact amount. Of
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
            consecutive ones along the input dimension stay, and so does the tail that m does not divide. Default: the
            pattern that the scores were made for, if any.
        min_keep: units that stay in each group (none by default: scores are sorted as they are; `plan` and recipes
            keep one), with scope "row" in each row. Where that binds, the next
            units go instead: of the whole ranking, or with separate scopes of the other groups in proportion
            to their size. Rows do not stand in for each other.
        protect: names of groups, or of modules that hold them, with shell wildcards. They stay whole and
            are not counted.
        groups: the groups that were scored; tells which dimension is the input in layers that keep their
            weight as [in, out] (ConvTranspose, Conv1D of transformers). Without it [out, in, ...] is assumed.
        shapes: group name -> shape of its weight, for allocation "erk" where scores are not per element.

    Returns:
        group name -> bool tensor of the score's shape on its device, True = keep; a dict that also holds the groups
        of the scores, so that `mask_model` and `plan(keep=...)` take it for every granularity.

    Raises:
        RecipeError: contradicting or unknown arguments, sparsity outside [0, 1), a pattern that matches nothing,
            a group that no pattern matches.
        TargetError: more units to remove than may be removed; names the reachable range.
        NonFiniteError: a score is NaN or infinite.

    Cost:
        Linear in the number of units (a selection, no sort): three passes over float32 scores, five over float64.
        Memory besides the scores: the masks, one byte per unit, and a chunk. More is held for allocation "lamp"
        (a sort) and for n:m patterns.

    Source:
        Han et al. 2015 for the threshold form; the total order is ours.

    Example:
        >>> select({"w": torch.tensor([3.0, 2.0, 1.0, 5.0])}, sparsity=0.5)["w"]
        tensor([ True, False, False,  True])
        >>> select({"a.w": torch.rand(10), "b.w": torch.rand(10)}, sparsity={"a": 0.3, "*": 0.5})["a.w"].sum().item()
        7
    """
    require_patterns(protect)
    free = _free(scores, protect)
    whole_number("min_keep", min_keep)
    known = tuple(groups) or getattr(scores, "groups", ())  # `score` hands its groups on
    axes = {group.name: group.attributes for group in known}
    rules = _Rules(scope, None if allocation == "global" else allocation, min_keep, axes, shapes)
    amounts = {"sparsity": sparsity, "count": count, "threshold": threshold}
    pattern = _pattern_of(known) if granularity is None else _pattern(granularity)
    if pattern is not None:
        plain = scope == "global" and rules.allocation is None and min_keep == 0
        _only_pattern(pattern, amounts, plain=plain)
        kept = {
            name: keep_pattern(at_least_single(score), pattern.n, pattern.m, dim=rules.dimension(name, "in_dim", 1))
            for name, score in free.items()
        }
    else:
        kept = {}
        for names, amount in _dealt(free, amounts, rules):
            kept |= _keep({name: free[name] for name in names}, amount, rules)
    whole = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items() if name not in kept}
    return Kept({name: kept[name] if name in kept else whole[name] for name in scores}, known)


def _dealt(
    scores: Mapping[str, Tensor], amounts: Mapping[str, float | Mapping[str, float] | None], rules: _Rules
) -> list[tuple[list[str], _Amount]]:
    """The sets of groups that are selected on their own, each with its amount; one set unless patterns are given."""
    key = _one_amount(amounts)
    given = amounts[key]
    if not isinstance(given, Mapping):
        return [(list(scores), _checked(key, given or 0))]
    if isinstance(rules.scope, Mapping):
        raise RecipeError(
            f"{key} and scope both name sets of groups", hint=f"give the sets to {key}; each is selected on its own"
        )
    return [(names, _checked(key, amount)) for names, amount in per_pattern(scores, given, what=key)]


def _keep(free: Mapping[str, Tensor], amount: _Amount, rules: _Rules) -> dict[str, Tensor]:
    """Masks of groups that share one amount."""
    scope, spreading = rules.scope, rules.allocation
    floors = {name: min(rules.min_keep, score.numel()) for name, score in free.items()}
    if spreading is not None and (scope != "global" or amount.threshold is not None):
        hint = 'leave scope at "global", and say sparsity or count'
        raise RecipeError(f"allocation={spreading!r} spreads a global sparsity or count", hint=hint)
    if amount.threshold is not None:
        return _above(free, amount.threshold, floors)
    if scope == "row":
        return _rows(free, amount, rules)
    if spreading is None:
        pools = _competitors(free, scope)
        return _pools(free, pools, _removed(free, pools, amount, floors), floors)
    spread = allocate(
        free, rules.shapes, name=spreading, sparsity=amount.sparsity, count=amount.count, min_keep=rules.min_keep
    )
    if spread.removed is None:
        whole = [list(free)]
        return _pools(spread.scores, whole, _removed(free, whole, amount, floors), floors)
    each = [[name] for name in spread.removed]
    return _pools(spread.scores, each, list(spread.removed.values()), floors)


def _removed(
    scores: Mapping[str, Tensor], pools: Sequence[Sequence[str]], amount: _Amount, floors: Mapping[str, int]
) -> list[int]:
    """Units to remove from each pool of competitors."""
    sizes = [sum(scores[name].numel() for name in pool) for pool in pools]
    limits = [size - sum(floors[name] for name in pool) for pool, size in zip(pools, sizes, strict=True)]
    count = amount.count or 0
    if amount.sparsity is not None:
        wanted = [round_half_up(amount.sparsity, size) for size in sizes]
        if all(w <= limit for w, limit in zip(wanted, limits, strict=True)):
            return wanted
        # Floors bind in some pool: the total still holds, and the other pools make up for it.
        count = sum(wanted)
    require_reachable(count, sum(limits), sum(sizes))
    return apportion(sizes, count, limits)


def _pools(
    scores: Mapping[str, Tensor], pools: Sequence[Sequence[str]], removed: Sequence[int], floors: Mapping[str, int]
) -> dict[str, Tensor]:
    """Masks of pools of which each loses its own count."""
    keep: dict[str, Tensor] = {}
    for pool, count in zip(pools, removed, strict=True):
        ordered = sorted(pool)  # the second key of the total order
        # One float64 score makes the pool float64: rounded to float32, different scores would tie.
        dtype = common_dtype([scores[name] for name in ordered])
        if count == 0:
            keep |= {name: torch.ones_like(scores[name], dtype=torch.bool) for name in ordered}
            continue
        total = sum(scores[name].numel() for name in ordered)
        sources = [floored(scores[name], floors[name], dtype) for name in ordered]
        border = find_border(partial(_one_after_another, sources), count, total, dtype)
        # One run over the whole pool, since ties are used up from group to group.
        pieces = kept_chunks(_one_after_another(sources), border)
        for name in ordered:
            keep[name] = assemble(pieces, scores[name])
    return keep


def _one_after_another(sources: Sequence[Chunks]) -> Iterator[Tensor]:
    return chain.from_iterable(chunks() for chunks in sources)


def _above(scores: Mapping[str, Tensor], threshold: float, floors: Mapping[str, int]) -> dict[str, Tensor]:
    keep = {}
    for name, score in scores.items():
        chunks = floored(score, floors[name], common_dtype([score]))
        keep[name] = assemble((chunk >= threshold for chunk in chunks()), score)
    return keep


def _rows(scores: Mapping[str, Tensor], amount: _Amount, rules: _Rules) -> dict[str, Tensor]:
    lines: dict[str, Tensor] = {}
    for name, score in scores.items():
        if score.dim() < 2:
            raise RecipeError(
                f'scope "row" needs scores with two dimensions; {name!r} has shape {tuple(score.shape)}',
                hint='use scope="local"',
            )
        lines[name] = score.movedim(rules.dimension(name, "out_dim", 0), 0)
    heights = {name: line.shape[0] for name, line in lines.items()}
    widths = {name: math.prod(line.shape[1:]) for name, line in lines.items()}
    sizes = [heights[name] * widths[name] for name in lines]
    limits = [(widths[name] - min(rules.min_keep, widths[name])) * heights[name] for name in lines]
    if amount.sparsity is not None:
        each = [round_half_up(amount.sparsity, widths[name]) * heights[name] for name in lines]
    else:
        each = apportion(sizes, amount.count or 0, limits)
    keep = {}
    for name, size, total, limit in zip(lines, sizes, each, limits, strict=True):
        require_reachable(total, limit, size)
        # What does not divide evenly goes from the first rows, one unit more from each.
        base, more = divmod(total, heights[name]) if heights[name] else (0, 0)
        kept = torch.ones(lines[name].shape, dtype=torch.bool, device=scores[name].device)
        drop_from_rows(lines[name][:more], kept[:more], base + 1)
        drop_from_rows(lines[name][more:], kept[more:], base)
        keep[name] = kept.movedim(0, rules.dimension(name, "out_dim", 0)).contiguous()
    return keep


def _free(scores: Mapping[str, Tensor], protect: Collection[str]) -> dict[str, Tensor]:
    if isinstance(protect, str):
        raise RecipeError(f"protect={protect!r} is one word", hint=f"write a list: [{protect!r}]")
    for word in protect:
        if not any(is_within(name, [word]) for name in scores):
            raise RecipeError(f"protect: {word!r} matches no group", hint=suggestion(word, scores))
    free = {}
    for name, score in scores.items():
        if not isinstance(score, Tensor) or not score.is_floating_point():
            raise InputError(f"the score of {name!r} is not a tensor of floating-point numbers")
        require_finite(score, name, what="score")
        if not is_within(name, protect):
            free[name] = score.detach()
    if not free:
        raise InputError("there are no units to select from", hint="is every layer protected, or of another kind?")
    return free


def _competitors(scores: Mapping[str, Tensor], scope: Scope) -> list[list[str]]:
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


def _pattern(granularity: Spec | None) -> NM | None:
    # Only n:m changes how a selection is made. Other units were formed when they were scored, those of the
    # structure engine among them, which `parse` would refuse.
    if granularity is None or granularity in STRUCTURAL or granularity in names():
        return NM() if granularity == NM.name else None
    parsed = parse(granularity)
    return parsed if isinstance(parsed, NM) else None


def _pattern_of(groups: Sequence[Group]) -> NM | None:
    """The pattern that scores were made for, as their groups say: any other choice would not be one of it."""
    found = (group.attributes for group in groups if group.granularity == NM.name)
    made_for = next((known for known in found if {"n", "m"} <= set(known)), None)
    return None if made_for is None else NM(n=made_for["n"], m=made_for["m"])


def _only_pattern(pattern: NM, amounts: Mapping[str, float | Mapping[str, float] | None], *, plain: bool) -> None:
    pattern.require({key: value for key, value in amounts.items() if value is not None})
    if not plain:
        raise RecipeError(
            f"{pattern.n}:{pattern.m} leaves nothing else to choose: it removes {pattern.share:g} of each line",
            hint="leave out scope, allocation and min_keep",
        )


def _one_amount(amounts: Mapping[str, float | Mapping[str, float] | None]) -> str:
    given = [key for key, value in amounts.items() if value is not None]
    if len(given) != 1:
        raise RecipeError(
            f"exactly one of sparsity, count and threshold is needed, not {len(given)}",
            hint="for example sparsity=0.5",
        )
    return given[0]


def _checked(key: str, value: float) -> _Amount:
    if key == "threshold":  # scores of other kinds than sizes may lie below zero, so that any number is one
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RecipeError(f"threshold={value!r} is not a finite number", hint="for example threshold=0.01")
        return _Amount(threshold=value)
    wrong = check_target(key, value)
    if wrong:
        raise RecipeError(f"{wrong}.", hint=f"for example {key}={0.3 if key == 'sparsity' else 12}")
    return _Amount(count=int(value)) if key == "count" else _Amount(sparsity=value)
