"""Copies of modules as `copy.deepcopy` makes them, in a fraction of its time where nothing in them is special."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from secateur.model.tensors import named_tensors

M = TypeVar("M", bound=nn.Module)
_ALONE = frozenset([int, float, bool, str, bytes, complex, type(None), type, FunctionType])  # these are never copied
_OWN_WAYS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs_ex__")


def copied(module: M, memo: dict[int, Any]) -> M:
    """What ``copy.deepcopy(module, memo)`` gives.

    Args:
        module: any module; what its class copies in a way of its own is copied that way.
        memo: id of an object -> what stands for it in the copy; filled up on the way.

    Example:
        >>> copied(nn.Linear(1, 2), {})
        Linear(in_features=1, out_features=2, bias=True)
    """
    known: M | None = memo.get(id(module))
    if known is not None:
        return known
    kind: Any = type(module)
    if not _is_plain(kind) or "__deepcopy__" in vars(module):
        before = dict(memo)
        made: M = copy.deepcopy(module, memo)
        if not _copies_by_building(kind) or _holds(module, made, before):
            return made
        # Its own way builds a whole model anew, whatever was to stand for its tensors.
        memo.clear()
        memo.update(before)
    result: M = object.__new__(kind)
    memo[id(module)] = result
    # As torch does: what `module.compile()` has made would go on calling the original.
    held = {key: value for key, value in vars(module).items() if key != "_compiled_call_impl"}
    vars(result).update({key: _value(value, memo) for key, value in held.items()})
    return result


def _value(value: Any, memo: dict[int, object]) -> object:
    if type(value) in _ALONE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in (tuple, set, torch.Size) and all(type(item) in _ALONE for item in value):
        return value.copy() if type(value) is set else value
    if isinstance(value, nn.Module):
        return copied(value, memo)
    if type(value) in (dict, OrderedDict):
        result = memo[id(value)] = type(value)()
        result.update({_value(key, memo): _value(item, memo) for key, item in value.items()})
        return result
    return copy.deepcopy(value, memo)


def _copies_by_building(kind: type[nn.Module]) -> bool:
    """Whether only `__deepcopy__` is a way of its own, so that an instance is its attributes all the same."""
    others = [name for name in _OWN_WAYS if name != "__deepcopy__"]
    own = any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in others)
    return hasattr(kind, "__deepcopy__") and not own and kind.__new__ is object.__new__


def _holds(module: nn.Module, made: nn.Module, memo: dict[int, Any]) -> bool:
    """Whether a copy holds what was to stand for tensors of the original."""
    copies = named_tensors(made)
    given = ((name, memo[id(tensor)]) for name, tensor in named_tensors(module).items() if id(tensor) in memo)
    return all(copies.get(name) is tensor for name, tensor in given)


@cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a copy of an instance is an instance with copies of its attributes, and nothing else."""
    own = all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _OWN_WAYS)
    above = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return own and kind.__new__ is object.__new__ and not any("__slots__" in vars(base) for base in above)
