"""Lists, loops and capsules while a model is captured: they say when a tracked integer decides something."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import dlpack

from secateur.structure.numbers import TrackedInt

_RANGE = builtins.range
INDEXED = (nn.ModuleList, nn.Sequential, nn.ParameterList)


class WatchedList(list[object]):
    """A list of plain values that says when a tracked integer picks one of them."""

    def __getitem__(self, key: Any) -> Any:
        if type(key) is TrackedInt:
            key._told("an index")
        return list.__getitem__(self, key)


class WatchedTuple(tuple[object, ...]):
    """The same as a tuple."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        if type(key) is TrackedInt:
            key._told("an index")
        return tuple.__getitem__(self, key)


class _Ranges(type):
    """Makes `isinstance(x, range)` and the like true of real ranges."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _RANGE)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, _RANGE)

    def __call__(cls, *bounds: Any) -> range:
        for bound in bounds:
            if type(bound) is TrackedInt:
                bound._told("the bound of a loop")
        return _RANGE(*bounds)


class WatchedRange(metaclass=_Ranges):
    """`range` while a model is captured: an integer that bounds a loop says so; Python asks such an integer nothing."""


@contextmanager
def watched(exported: Callable[[Tensor], None]) -> Iterator[None]:
    """Put `WatchedRange` in the place of `range`, and hear of what no mode sees.

    Args:
        exported: is told of every tensor that becomes a DLPack capsule.
    """
    export = getattr(dlpack, "to_dlpack")  # noqa: B009 - torch has it, and exports it to nobody

    def to_dlpack(tensor: Tensor) -> object:
        exported(tensor)
        return export(tensor)

    kept = {kind: kind.__getitem__ for kind in INDEXED}
    for kind, getitem in kept.items():
        setattr(kind, "__getitem__", _told(getitem))  # noqa: B010 - a type checker forbids the plain form
    builtins.range = WatchedRange  # type: ignore[misc,assignment]
    _put(to_dlpack)
    try:
        yield
    finally:
        for kind, getitem in kept.items():
            setattr(kind, "__getitem__", getitem)  # noqa: B010
        builtins.range = _RANGE  # type: ignore[misc]
        _put(export)


def _told(getitem: Callable[[Any, Any], object]) -> Callable[[object, object], object]:
    def pick(self: object, key: object) -> object:
        if type(key) is TrackedInt:
            key._told("an index")
        return getitem(self, key)

    return pick


def _put(export: Callable[[Tensor], object]) -> None:
    for owner in (dlpack, torch):
        setattr(owner, "to_dlpack", export)  # noqa: B010
