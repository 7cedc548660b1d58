"""What the code does with the number of experts, beside sizing tensors: that must not mean something else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from secateur.kinds.numbers_used import NumbersUsed, Site, Used, is_same, require_same
from secateur.structure.axes import Atom, leaves, size_after
from secateur.structure.provenance import Attribute, attributes_in, dims_in, evaluate
from secateur.structure.trace import SizeUse, Trace
from secateur.types import Lock

COUNT = re.compile(r"experts|(num|n|nr|count)_?expert|expert_?(num|count)")
OTHER = re.compile(r"per_|shared|top_?k|capacity|group|size|dim|hidden|width")
LARGE = 1009  # so many times as large are inputs on which rounding hides nothing

COUNTS = "{} compares numbers of experts with how many there are, which follows"
# Whole numbers in these are no sizes: what is chosen, cut off or drawn by them is another thing.
STRICT = ("topk", "kthvalue", "slice", "select", "narrow", "cumsum", "sort", "multinomial")


def same_numbers(before: NumbersUsed, after: NumbersUsed, pairs: Mapping[int, int]) -> Iterator[str]:
    """Refuse numbers that the code takes from how many experts there are, other than sizes and numbers of experts.

    A loop over experts runs less often once some are gone, and on data that are dealt out nothing says which of its
    turns belong together: then each number has to be one that the reference used at the same line.

    Args:
        before: of the reference, whose routers cannot choose what is gone.
        after: of the cut model.
        pairs: experts of a block before -> after.

    Raises:
        CertificateError: names the line.
    """
    for site, left in after.calls.items():
        calls = before.calls.get(site, [])
        together = calls if len(calls) == len(left) else None
        for n, call in enumerate(left):
            same = [together[n]] if together is not None else calls
            if any(one.size != call.size or _fits(before, after, one, call) for one in same):
                continue
            if any(_counts_alike(site, one, call, pairs) for one in same):
                if call.pointwise:
                    yield COUNTS.format(site[0])
                continue
            if not same:
                yield f"{site[0]} runs in the cut model only"
                continue
            require_same(site, before, after, same[0], call)


def _fits(before: NumbersUsed, after: NumbersUsed, one: Used, other: Used) -> bool:
    return len(one.numbers) == len(other.numbers) and all(
        is_same(before, after, a, b) for a, b in zip(one.numbers, other.numbers, strict=True)
    )


def _counts_alike(site: Site, one: Used, other: Used, pairs: Mapping[int, int]) -> bool:
    """Whether the numbers of two calls are sizes that follow, or numbers of the last expert or the one behind it."""
    if len(one.numbers) != len(other.numbers) or site[1] in STRICT:
        return False
    if other.pointwise and not other.whole:
        return False
    fits = _is_number if other.pointwise else _is_size
    differ = [(a, b) for a, b in zip(one.numbers, other.numbers, strict=True) if a != b]
    return all(any(fits(a, b, size, left) for size, left in pairs.items()) for a, b in differ)


def _is_number(a: float, b: float, size: int, left: int) -> bool:
    return (a, b) in ((size, left), (size - 1, left - 1))


def _is_size(a: float, b: float, size: int, left: int) -> bool:
    whole = type(a) is int and type(b) is int
    return whole and (a * left == b * size or (a + 1) * left == (b + 1) * size)


def mixed(record: Trace, atom: Atom) -> Iterator[Lock]:
    """Locks for lines that reckon with the count of experts and with a size of the data, and round what comes out.

    Args:
        record: of the original.
        atom: the dimension of the experts.
    """
    counted = [a for a, v in record.values.items() if v == atom.size and is_count(a.name)]
    for use in record.size_uses:
        if _changes(record, use, atom, counted):
            yield Lock(
                "a capacity or share made of how many experts there are would be another one",
                use.place.op,
                use.place.module,
                use.place.where,
                "keep it in an attribute that does not follow the experts",
            )


def is_count(name: str) -> bool:
    """Whether an attribute of this name says how many experts there are."""
    return COUNT.search(name) is not None and OTHER.search(name) is None


def _changes(record: Trace, use: SizeUse, atom: Atom, counted: Sequence[Attribute]) -> bool:
    dims = {leaf for axis in dims_in(use.expr) for leaf in leaves(axis)}
    if dims <= {atom} or not (atom in dims or set(attributes_in(use.expr)) & set(counted)):
        return False
    large = {leaf.id: leaf.size * LARGE for leaf in dims if leaf is not atom}
    own = [] if isinstance(use.axis, int) else [leaf for leaf in leaves(use.axis)]
    before = evaluate(use.expr, {**large, atom.id: atom.size}, record.values)
    for left in range(1, atom.size):
        counts = {**large, atom.id: left}
        after = evaluate(use.expr, counts, {**record.values, **dict.fromkeys(counted, left)})
        wanted = size_after(use.axis, counts) if atom in own and not isinstance(use.axis, int) else before
        if after != wanted:
            return True
    return False
