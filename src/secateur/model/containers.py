"""Lists, mappings and sets: what was in them, and how they are filled with that again."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from operator import is_
from typing import Any, TypeVar

from secateur.model.reach import base_of

K = TypeVar("K")
V = TypeVar("V")


class Containers:
    """Lists, mappings and sets, and what was in them."""

    def __init__(self) -> None:
        self.empty: list[tuple[dict[object, object] | set[object], ...]] = []
        self.mappings: list[tuple[dict[object, object], dict[object, object]]] = []
        self.sequences: list[tuple[list[object] | deque[object], tuple[object, ...]]] = []
        self.sets: list[tuple[set[object], frozenset[object]]] = []

    def add_all(self, mappings: tuple[dict[object, object], ...]) -> None:
        """Keep several, most of which are empty."""
        if not any(mappings):
            self.empty.append(mappings)
            return
        for mapping in mappings:
            self.mappings.append((mapping, dict(mapping)))

    def add(self, value: object) -> Iterable[object]:
        """Keep one, and return what is in it. Subclasses are read by the methods of the builtin class."""
        if isinstance(value, dict):
            before = _entries(value)
            self.mappings.append((value, before))
            return before.values()
        if isinstance(value, (list, deque)):
            items = tuple(base_of(value).__iter__(value))  # type: ignore[attr-defined]
            self.sequences.append((value, items))
            return items
        if isinstance(value, set):
            self.sets.append((value, frozenset(value)))
            return ()
        return tuple.__iter__(value) if isinstance(value, tuple) else ()

    def renewed(self, mappings: Collection[int]) -> Containers:
        """The same containers, of which some mappings (by id) are kept as they are now."""
        other = copy.copy(self)
        other.mappings = [(m, _entries(m) if id(m) in mappings else before) for m, before in self.mappings]
        return other

    def changed(self) -> bool:
        """Whether a container holds other things than it did."""
        return (
            any(any(containers) for containers in self.empty)
            or any(is_other(live, before) for live, before in self.mappings)
            or any(
                len(sequence) != len(items) or not all(map(is_, base_of(sequence).__iter__(sequence), items))  # type: ignore[attr-defined]
                for sequence, items in self.sequences
            )
            or any(members != known for members, known in self.sets)
        )

    def put_back(self) -> None:
        """Refill the containers that have changed. Compared by identity: tensors have no ``==``."""
        for containers in self.empty:
            if any(containers):
                for container in containers:
                    container.clear()
        for live, before in self.mappings:
            refill(live, before)
        for sequence, items in self.sequences:
            base: Any = base_of(sequence)
            now = tuple(base.__iter__(sequence))
            if len(now) != len(items) or not all(map(is_, now, items)):
                base.clear(sequence)
                base.extend(sequence, items)
        for members, known in self.sets:
            if members != known:
                set.clear(members)
                set.update(members, known)


def _entries(mapping: dict[K, V]) -> dict[K, V]:
    if type(mapping) is dict:
        return mapping.copy()
    # An ordered mapping keeps its order beside the entries, where the methods of dict do not see it.
    return dict(OrderedDict.items(mapping) if isinstance(mapping, OrderedDict) else dict.items(mapping))


def refill(live: dict[K, V], before: dict[K, V]) -> None:
    """Bring a mapping back to its entries, in their order."""
    if is_other(live, before):
        base: Any = OrderedDict if isinstance(live, OrderedDict) else dict
        base.clear(live)
        for key, value in before.items():
            base.__setitem__(live, key, value)


def is_other(live: dict[K, V], before: dict[K, V]) -> bool:
    """Whether a mapping holds other entries than these, or in another order; compared by identity."""
    now = live if type(live) is dict else _entries(live)  # asked for every module after every run: no copy
    same = len(now) == len(before) and all(map(is_, now, before)) and all(map(is_, now.values(), before.values()))
    return not same
