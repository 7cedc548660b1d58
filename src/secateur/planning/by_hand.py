"""Units and scores that the caller gave, held against what may go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.kinds.base import Candidates, Family, Keep
from secateur.model.call import describe
from secateur.registry import suggestion
from secateur.types import Condition, Group


def given_scores(candidates: Candidates, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The scores that the caller gave; groups without any leave the candidates, so that their units stay.

    Raises:
        InputError: an unknown or locked group, scores that do not fit, or scores for a part of
            those that keep equal counts.
    """
    known = {group.name: group for group in candidates.groups}
    for name, score in scores.items():
        group = known_group(known, name, candidates)
        if not isinstance(score, Tensor) or score.is_meta:
            raise InputError(
                f"the scores of {name!r} are no tensor with values: {describe(score)}",
                why="it is on the meta device" if isinstance(score, Tensor) else "",
                hint="one number per unit in a tensor: torch.tensor([...])",
            )
        if tuple(score.shape) != group.shape or not score.is_floating_point():
            raise InputError(
                f"the scores of {name!r} are {score.dtype} {tuple(score.shape)}, not float {group.shape}",
                hint="one score per unit, higher = keep",
            )
        if not bool(torch.isfinite(score).all()):
            raise InputError(f"the scores of {name!r} hold NaN or Inf")
    # Whoever leaves a group out has not said that its units are worth little: they stay and do not count.
    candidates.groups = [group for group in candidates.groups if group.name in scores]
    for family in candidates.families:
        missing = [name for name in family.groups if name not in scores]
        if 0 < len(missing) < len(family.groups):
            raise InputError(
                f"scores= holds no scores of {missing[0]!r}",
                why="one number sizes it and groups that have scores, so they keep equally many units",
                hint="give scores for all of: " + ", ".join(family.groups[:5]),
            )
    candidates.families = [family for family in candidates.families if family.groups[0] in scores]
    if not candidates.groups:
        raise InputError("scores= holds no group.", hint=f"groups: {', '.join(list(known)[:5])}")
    return scores


def given_keep(
    candidates: Candidates, keep: Mapping[str, Tensor] | None, remove: Mapping[str, Sequence[int]] | None
) -> Keep:
    """Which units stay, as the caller said, with every group that is left out whole.

    Raises:
        InputError: an unknown or locked group, a mask that does not fit, units that do not exist, or all of them.
    """
    known = {group.name: group for group in candidates.groups}
    result = {group.name: torch.ones(group.shape, dtype=torch.bool) for group in candidates.groups}
    for name, mask in (keep or {}).items():
        group = known_group(known, name, candidates)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != group.shape:
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"keep of {name!r} is {found}, not bool {group.shape}", hint="True = the unit stays")
        result[name] = mask.cpu().clone()
    for name, numbers in (remove or {}).items():
        group = known_group(known, name, candidates)
        wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < group.size]
        if wrong:
            raise InputError(f"{name!r} has no unit {wrong[0]!r}", hint=f"its units are 0 to {group.size - 1}")
        result[name].view(-1)[list(numbers)] = False
    for name, mask in result.items():
        group = known[name]
        _allowed(candidates, group, mask)
        if name in {**(keep or {}), **(remove or {})}:
            candidates.conditions = (*candidates.conditions, *begins_later(group))
    for family in candidates.families:
        _equal_counts(family, result)
    return result


def begins_later(group: Group) -> Iterator[Condition]:
    """Where only a part of a dimension may go, its units have other numbers than the rows of the weight."""
    for span in group.spans[:1]:
        if span.index is None:
            continue
        there = (span.index.flatten() >= 0).nonzero().flatten()
        if span.index.numel() == max(span.index.shape, default=0) and len(there) and int(there[0]) > 0:
            text = f"unit 0 of {group.name!r} is position {int(there[0])} of {span.tensor!r}: those before it stay"
            yield Condition(f"units were named by their numbers in the group, and {text}")


def _equal_counts(family: Family, keep: Keep) -> None:
    counts = {name: int(keep[name].sum()) for name in family.groups}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[least] != counts[most]:
        raise InputError(
            f"{least!r} would keep {counts[least]} units and {most!r} {counts[most]}",
            why="one number sizes both",
            hint="remove equally many units from each of: " + ", ".join(family.groups[:5]),
        )
    if counts[least] < family.least:
        raise InputError(f"{least!r} would keep {counts[least]} units", why=f"at least {family.least} are needed")


def _allowed(candidates: Candidates, group: Group, mask: Tensor) -> None:
    left, stays = int(mask.sum()), candidates.stays(group)
    multiple = group.attributes.get("multiple", 1)
    if candidates.physical and left == 0:
        raise InputError(f"{group.name!r} would lose all its {group.size} units", hint="keep at least one")
    if stays is not None and bool((stays & ~mask).any()):
        unit = int(torch.nonzero(stays & ~mask)[0])
        why = group.attributes.get("why", ("",) * group.size)[unit]
        hint = "" if why else "see `secateur inspect` for the reason"
        raise InputError(f"unit {unit} of {group.name!r} is locked", why=why, hint=hint)
    if left < group.size and left % multiple:
        raise InputError(
            f"{group.name!r} would keep {left} units, which is no multiple of {multiple}",
            why="a coupled dimension is divided into as many parts",
        )


def known_group(known: Mapping[str, Group], name: str, candidates: Candidates) -> Group:
    """The group of that name; if there is none that may go, the error says why."""
    if name in known:
        return known[name]
    locked = next((g for g in candidates.structure.groups if g.name == name), None) if candidates.structure else None
    if locked is not None and locked.locks:
        lock = locked.locks[0]
        raise InputError(f"group {name!r} is locked", why=lock.reason, hint=lock.hint or lock.where)
    raise InputError(f"no group is called {name!r}", hint=suggestion(name, known))
