"""Integers that remember where they came from, so that attributes can follow a cut.

While the model runs, integer attributes of its modules and configs are replaced by `TrackedInt`, and so are the sizes
that `Tensor.shape` returns. Arithmetic builds an expression; when such a number reaches a reshape, the engine learns
which attribute has to change when that dimension is cut. A number without provenance is a literal in the user's code.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from secateur.model.containers import is_other
from secateur.model.modules import named_modules
from secateur.structure.expressions import (
    Apply,
    Attribute,
    Const,
    Dim,
    Expr,
    attributes_in,
    dims_in,
    evaluate,
    is_literal,
)
from secateur.structure.numbers import TrackedFlag, TrackedInt, Watcher, expr_of
from secateur.structure.watched import WatchedList, WatchedTuple

__all__ = [
    "Apply",
    "Attribute",
    "Const",
    "Dim",
    "Expr",
    "TrackedFlag",
    "TrackedInt",
    "attributes_in",
    "dims_in",
    "evaluate",
    "expr_of",
    "held",
    "is_literal",
    "is_users",
    "owner_at",
    "owners",
    "read",
    "tracked_attributes",
    "write",
]
NUMBERS = frozenset([int, float, bool, str])
SERIES = (list, tuple)
Number = tuple[str, int | Sequence[int], tuple[Attribute, ...]]  # its name, its value, and what it is called
Found = dict[str, tuple[dict[str, object], Sequence[Number]]]  # owner -> its entries, and the numbers among them
PLAIN = frozenset([dict, OrderedDict, list, set, bool, int, float, str, tuple, type(None)])


def owners(model: nn.Module) -> Iterator[tuple[str, object]]:
    """(dotted path, object) of every module and of the config objects that modules hold; each object once."""
    seen: set[int] = set()
    for path, module in named_modules(model):
        yield path, module
        for name, value in vars(module).items():
            if type(value) not in PLAIN and _is_config(value) and id(value) not in seen:
                seen.add(id(value))
                yield f"{path}.{name}" if path else name, value


def _is_config(value: object) -> bool:
    if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return False
    name = type(value).__name__
    if name.endswith(("Config", "Args", "Arguments", "Namespace")):
        return True
    return dataclasses.is_dataclass(value) and not getattr(value, "__dataclass_params__").frozen  # noqa: B009


def owner_at(model: nn.Module, path: str) -> object:
    """The module or config object at a dotted path of `owners`."""
    target: Any = model
    for part in path.split(".") if path else []:
        target = target._modules[part] if part in getattr(target, "_modules", {}) else vars(target)[part]
    return target


def held(owner: object, name: str) -> Any:
    """What stands under a name in an object, or in its class where that is the user's.

    Raises:
        KeyError: neither has it.
    """
    store = vars(owner)
    return store[name] if name in store else _of_class(owner)[name]


def _of_class(owner: object) -> dict[str, int]:
    """Integers that stand on the classes of a module: a cut gives the module its own, which hides that of the class."""
    found: dict[str, int] = {}
    for kind in reversed(type(owner).__mro__) if isinstance(owner, nn.Module) else ():
        if issubclass(kind, nn.Module) and not kind.__module__.startswith("torch."):
            found.update((n, v) for n, v in vars(kind).items() if type(v) is int and not n.startswith("_"))
    return found


def read(model: nn.Module, attribute: Attribute) -> int:
    """Current value of an attribute."""
    value = held(owner_at(model, attribute.owner), attribute.name)
    value = value if attribute.item is None else value[attribute.item]
    return cast(int, value if value is None else int(value))  # None: a config's "the default"


def write(model: nn.Module, attribute: Attribute, value: int) -> None:
    """Set an attribute, keeping the container type of tuples and lists."""
    store = vars(owner_at(model, attribute.owner))
    if attribute.item is None:
        store[attribute.name] = value
        return
    old = store[attribute.name]
    store[attribute.name] = type(old)(value if i == attribute.item else item for i, item in enumerate(old))


@contextmanager
def tracked_attributes(
    model: nn.Module, values: dict[Attribute, int], watch: Watcher, found: Found, *, flags: bool = False
) -> Iterator[None]:
    """Replace integer attributes by tracked ones and note their `values`; the attributes are put back on exit.

    What is in their containers a guard puts back, which stands around every run.

    Args:
        model: its modules and their configs get tracked integers.
        values: is filled with the attributes as they are.
        watch: is told what the forward does with them.
        found: what earlier runs have found in each owner, for those that hold the same as then; is filled.
        flags: also follow `training` of modules that are no classes of torch.
    """
    saved: list[tuple[dict[str, object], dict[str, object]]] = []
    classes: dict[type, dict[str, int]] = {}
    # All owners first: behind them their numbers are no plain ones, and every one would be looked at as a config.
    for path, owner in list(owners(model)):
        store = vars(owner)
        before = dict(store)
        saved.append((store, before))
        if type(owner) not in classes:
            classes[type(owner)] = _of_class(owner)
        entries = {**classes[type(owner)], **before}
        last, numbers = found.get(path, ({}, ()))
        if is_other(entries, last):
            numbers = tuple(_numbers(path, entries))
            if list not in map(type, entries.values()):  # what is in a list may change, and it is the same list
                found[path] = entries, numbers
        for name, value, parts in numbers:
            if isinstance(value, int):
                values[parts[0]] = value
                store[name] = TrackedInt(value, parts[0], watch)
                continue
            values.update(zip(parts, value, strict=bool(parts)))
            items = [TrackedInt(v, part, watch) for v, part in zip(value, parts, strict=True)] if parts else value
            store[name] = WatchedList(items) if type(value) is list else WatchedTuple(items)
        if flags and type(before.get("training")) is bool and is_users(owner):
            store["training"] = TrackedFlag(before["training"], watch)
    try:
        yield
    finally:
        for store, before in saved:
            for name in store.keys() - before.keys():
                del store[name]
            store.update(before)


def _numbers(path: str, entries: Mapping[str, object]) -> Iterator[Number]:
    """Every integer and every series of numbers; a series that is not of integers alone has no attributes."""
    for name, value in entries.items():
        if type(value) is int:
            yield name, value, (Attribute(path, name),)
        elif isinstance(value, (tuple, list)) and type(value) in SERIES and value:
            kinds = set(map(type, value))
            if kinds == {int}:
                yield name, value, tuple(Attribute(path, name, i) for i in range(len(value)))
            elif kinds.issubset(NUMBERS):
                yield name, value, ()


def is_users(owner: object) -> bool:
    """Whether the code of a module is not torch's, which is known to keep its structure in both modes."""
    return isinstance(owner, nn.Module) and not type(owner).__module__.startswith("torch.")
