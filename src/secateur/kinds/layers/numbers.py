"""What the code does with how many blocks there are, and with their places, beside calling them one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from secateur.errors import CertificateError
from secateur.kinds.layers.drop import Layers
from secateur.kinds.numbers_used import HINT, NumbersUsed, Site, Used, by_turns, require_same
from secateur.structure.rules.base import MOVED

# These hand on what they are given, however much it is; a pointwise call does so too.
HANDS_ON = frozenset([
    *MOVED, "stack", "cat", "select", "slice", "unbind", "index", "index_select", "narrow", "split", "split_with_sizes",
    "chunk", "copy", "select_scatter", "slice_scatter", "unsqueeze", "squeeze", "zeros_like", "ones_like", "empty_like",
    "lift_fresh", "new_zeros", "new_ones", "new_empty", "index_put",
])  # fmt: skip
ONCE = frozenset([*HANDS_ON, "relu", "clamp", "clamp_min", "clamp_max", "hardtanh", "abs", "sign", "round"])  # as twice
LESS = "{} runs {} less often than in the original; on the inputs that were tried it makes no difference"
MOST = 4  # lines of which that is said


def which_stay(layers: Layers) -> list[list[bool]]:
    """For each stack, which of its blocks stay."""
    return [[i not in entry["removed"] for i in range(entry["size"])] for entry in layers.values()]


def same_numbers(before: NumbersUsed, after: NumbersUsed, stays: Sequence[Sequence[bool]]) -> Iterator[str]:
    """Refuse numbers that the code takes from how many blocks there are, or from the place of a block.

    A line of the loop over the blocks runs less often once some are gone: what it was given for the others has to be
    what it was.

    Args:
        before: of the original with identity in the place of what goes.
        after: of the smaller model.
        stays: as `which_stay` gives it.

    Raises:
        CertificateError: names the line.
    """
    for site, left in after.calls.items():
        calls = before.calls.get(site, [])
        chosen = calls if len(calls) == len(left) else by_turns(calls, left, stays)
        if chosen is None:
            known = {call.numbers for call in calls}
            new = next((call.numbers for call in left if call.numbers and call.numbers not in known), None)
            if new is not None:
                yield f"{site[0]} runs with other numbers than in the original ({site[1]}: {new[0]:g}, for example)"
            continue
        for one, other in zip(chosen, left, strict=True):
            if one.size == other.size:
                require_same(site, before, after, one, other)
            _require_as_many(site, one, other)
    less = [site for site, calls in before.calls.items() if len(calls) > len(after.calls.get(site, []))]
    less = [site for site in less if site[1] not in ONCE]
    yield from (LESS.format(*site) for site in less[:MOST])
    if len(less) > MOST:
        yield f"{len(less) - MOST} more such lines"


def _require_as_many(site: Site, one: Used, other: Used) -> None:
    """Refuse a sum, a mean or a product over as many things as there are blocks."""
    if one.shapes == other.shapes or other.pointwise or site[1] in HANDS_ON:
        return
    a, b = next(((a, b) for a, b in zip(one.shapes, other.shapes, strict=False) if a != b), (one.shapes, other.shapes))
    raise CertificateError(
        "The function of what is left would change with the cut, also where the example does not show it.",
        why=f"{site[0]} puts together what there is of each block ({site[1]} of {a}, then of {b})",
        hint=HINT,
    )
