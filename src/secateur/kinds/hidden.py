"""Two runs beside each other: lines that were given another number than in the reference, and gave the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from secateur.kinds.absorbed import LONGEST, NONE, Absorbed, Key, Spot, Taken

MOST = 6  # lines that are said in full


def absorbed(before: Absorbed, after: Absorbed) -> Iterator[str]:
    """Lines that were given another number than in the reference, and gave the same.

    Args:
        before: of the reference.
        after: of the cut model.
    """
    found: dict[str, str] = {}
    for site, now in after.seen.items():
        then = list(before.seen.get(site, {}))
        new = [each for each in now if each not in then]
        for n, seen in enumerate(new):
            old = _beside(then, seen, list(now), n)
            change = None if old is None else _hidden(site, old, seen, before.sliced | after.sliced)
            if change is not None:
                found.setdefault(site.where, f"{site.where} reckons with another number than before ({change})")
    lines = list(found.values())
    end = "; on the inputs that were tried it makes no difference"
    yield from (line + end for line in lines[:MOST])
    if len(lines) > MOST:
        yield f"{len(lines) - MOST} more such lines: {', '.join(list(found)[MOST:])}"


def _beside(then: Sequence[Taken], seen: Taken, now: Sequence[Taken], n: int) -> Taken | None:
    """Which of what the reference saw belongs to this: by turns where there are as many, else what has gone."""
    if len(then) == len(now):
        return then[now.index(seen)]
    gone = [each for each in then if each not in now] or list(then)
    return gone[min(n, len(gone) - 1)] if gone else None


def _hidden(site: Spot, old: Taken, new: Taken, sliced: set[str]) -> str | None:
    """How a number changed without a difference; None where none did, or what came of it differs as well."""
    if len(old.given) != len(new.given):
        return None
    differ = [not (_same(a, b) or _are_words(a)) for a, b in zip(old.given, new.given, strict=True)]
    if not any(differ):
        return None
    pairs = [(a, b) for a, b, other in zip(old.given, new.given, differ, strict=True) if other]
    hides = _HIDES.get(site.kind, _comes_to_the_same)
    if not hides(site, old, new, pairs) or (site.kind == "Subscript" and new.gave == NONE and site.where in sliced):
        return None
    a, b = pairs[0]
    return f"{_short(a)} becomes {_short(b)}, in `{site.text}`"


def _same(a: Key, b: Key) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b or math.isclose(a, b, rel_tol=1e-9) or (a != a and b != b)
    return type(a) is type(b) and a == b


def _are_words(key: Key) -> bool:
    """Whether it is a list of words, one for each block say: data, and no number."""
    return isinstance(key, tuple) and any(isinstance(item, str) for item in key)


Pairs = Sequence[tuple[Key, Key]]


def _comes_to_the_same(site: Spot, old: Taken, new: Taken, pairs: Pairs) -> bool:
    if NONE in (old.gave, new.gave):
        return site.kind in ("FloorDiv", "Mod", "Compare", "Call", "Subscript")
    # A ratio or a difference of two sizes that shrink alike is what it is meant to be.
    alike = len(pairs) == len(old.given) > 1 and site.kind in ("FloorDiv", "Div", "Sub", "Mod", "Compare")
    return not alike and _same(old.gave, new.gave)


def _bounds_nothing(site: Spot, old: Taken, new: Taken, pairs: Pairs) -> bool:
    """Whether all bounds that differ lie outside of what they bound, other than at its very end, in both runs.

    A bound inside of a dimension that is as long as before takes other positions: what comes of it is hidden later on.
    """
    (one,), (other,) = old.sizes, new.sizes
    for a, b in pairs:
        if not (isinstance(a, int) and isinstance(b, int)):
            return False
        if one == other:
            continue
        if abs(a) < one or abs(b) < other or (abs(a) == one and abs(b) == other):
            return False
    return True


def _is_beyond(site: Spot, old: Taken, new: Taken, pairs: Pairs) -> bool:
    one, other = max(old.sizes, default=0), max(new.sizes, default=0)
    return all(
        isinstance(a, int) and isinstance(b, int) and abs(a) >= one and abs(b) >= other and (a, b) != (one, other)
        for a, b in pairs
    )


def _is_window(site: Spot, old: Taken, new: Taken, pairs: Pairs) -> bool:
    follows = all(a in old.sizes and b in new.sizes for a, b in pairs)
    return not follows and old.gave == new.gave


_HIDES: dict[str, Callable[[Spot, Taken, Taken, Pairs], bool]] = {
    "bounds": _bounds_nothing, "beyond": _is_beyond, "window": _is_window,
}  # fmt: skip


def _short(value: Key) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
