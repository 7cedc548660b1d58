"""What a model can reach beside its modules and tensors: objects, functions and their closures, classes, globals.

A forward may count in an object of its own, in a variable of the function that made it, or on its class. What is found
here is kept and put back by `secateur.model.state`.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from argparse import Namespace
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cached_property, partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from secateur.model.moving import is_moving

Kind = Literal[
    "plain", "module", "parameter", "tensor", "container", "array", "random", "function", "object", "answers",
    "variable", "local", "moving",
]  # fmt: skip
Place = tuple[dict[str, object], str]  # a namespace and a name in it

CONTAINERS = (dict, list, deque, set, tuple)
BUILTIN = frozenset({OrderedDict, *CONTAINERS})
ARRAYS = (np.ndarray, bytearray, array)
RANDOM = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
FUNCTIONS = (FunctionType, MethodType, partial, CellType, staticmethod, classmethod, property, cached_property)
# Objects of Python that are made to hold what a user puts in.
HOLDERS = (UserDict, UserList, SimpleNamespace, Namespace)
ANSWERS = type(functools.lru_cache(lambda: None))
AMBIENT = (ANSWERS, ContextVar, threading.local)  # what outlives a call without standing in any object of the model
NUMBERS = (int, float, complex, str, bytes, type(None))
# What these packages keep in their objects is their own affair: a logger alone reaches half the process.
FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "secateur"})
# Modules that read and write files of weights. What they remember of each file that was ever loaded no forward asks
# for, and it is many times what a model holds.
LOADERS = frozenset({"transformers.conversion_mapping", "transformers.core_model_loading"})


def kind_of(value: object) -> Kind:
    """What has to be done to keep a value; asked once per class, as isinstance is slow on tensors and modules."""
    if isinstance(value, nn.Module):
        return "module"
    if isinstance(value, Tensor):
        return "parameter" if type(value) is nn.Parameter else "tensor"
    if isinstance(value, CONTAINERS):
        return "container"
    if isinstance(value, ARRAYS):
        return "array"
    if isinstance(value, RANDOM):
        return "random"
    if isinstance(value, FUNCTIONS):
        return "function"
    if isinstance(value, HOLDERS):
        return "object"
    if isinstance(value, AMBIENT):
        return "answers" if isinstance(value, ANSWERS) else "variable" if isinstance(value, ContextVar) else "local"
    if is_moving(value):
        return "moving"
    if isinstance(value, (type, ModuleType, BuiltinFunctionType, *NUMBERS)) or is_foreign(type(value)):
        return "plain"
    return "object"


def is_foreign(kind: type) -> bool:
    """Whether a class belongs to Python, torch, NumPy or this package."""
    return kind.__module__.partition(".")[0] in FOREIGN


def slots_of(value: object) -> Iterator[str]:
    """Names of the slots of an object that hold something."""
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name


def inside(function: object) -> Iterator[object]:
    """What a function holds: cells of its closure, defaults, attributes, and what it is bound to.

    Functions of `FOREIGN` hold nothing here: a hook of this package collects what a criterion is about to read.
    """
    if _within_foreign(function):
        return
    if isinstance(function, MethodType):
        yield from (function.__self__, function.__func__)
    elif isinstance(function, partial):
        yield from (function.func, function.args, function.keywords)
    elif isinstance(function, (staticmethod, classmethod)):
        yield function.__func__
    elif isinstance(function, property):
        yield from (part for part in (function.fget, function.fset) if part is not None)
    elif isinstance(function, cached_property):
        yield function.func
    elif isinstance(function, FunctionType):
        yield from function.__closure__ or ()
        yield from (part for part in (function.__defaults__, function.__kwdefaults__) if part)
        if vars(function):
            yield vars(function)


def _within_foreign(function: object) -> bool:
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", "")).partition(".")[0] in FOREIGN


def user_classes(kind: type) -> Iterator[type]:
    """A class and its bases, without those of torch and Python."""
    return (base for base in kind.__mro__ if not is_foreign(base))


_GLOBALS: WeakKeyDictionary[FunctionType, tuple[Place, ...]] = WeakKeyDictionary()
_STILL: WeakKeyDictionary[FunctionType, bool] = WeakKeyDictionary()


def globals_of(function: FunctionType) -> tuple[Place, ...]:
    """Variables of modules that a function uses, and functions that it calls: where they stand.

    Classes, modules and functions that hold nothing are left out: only what can change is kept.
    """
    known = _GLOBALS.get(function)
    if known is None:
        found: dict[tuple[int, str], Place] = {}
        _collect(function, found, set())
        known = _GLOBALS[function] = tuple(found.values())
    return known


def is_still(function: FunctionType) -> bool:
    """Whether a method holds nothing that can change, as nearly all do: looked at once, as classes have hundreds."""
    known = _STILL.get(function)
    if known is None:
        known = _STILL[function] = _within_foreign(function) or (
            all(_is_class(part) for part in inside(function)) and not globals_of(function)
        )
    return known


def _is_class(part: object) -> bool:
    """Whether a cell holds a class: that of the method itself, for ``super()``; or a default that is a number."""
    try:
        held = part.cell_contents if isinstance(part, CellType) else part
    except ValueError:  # a variable that is not bound yet
        return False
    if isinstance(held, tuple):
        return all(map(_is_class, held))
    return isinstance(held, type) or (isinstance(held, NUMBERS) and not isinstance(part, CellType))


def _collect(value: object, found: dict[tuple[int, str], Place], seen: set[int]) -> None:
    if not isinstance(value, FUNCTIONS) or id(value) in seen:
        return
    seen.add(id(value))
    if not isinstance(value, FunctionType):
        for part in inside(value):
            _collect(part, found, seen)
        return
    if _within_foreign(value):
        return
    space = value.__globals__
    if space.get("__name__") in LOADERS:
        return
    for name in _names(value.__code__):
        if name not in space:
            continue
        held = space[name]
        if isinstance(held, FunctionType):
            _collect(held, found, seen)
            if not _within_foreign(held) and not all(map(_is_class, inside(held))):
                found[id(space), name] = (space, name)  # it holds something itself: in its closure, or as a default
        elif isinstance(held, ANSWERS):
            _collect(held.__wrapped__, found, seen)
            if not _within_foreign(held.__wrapped__):
                found[id(space), name] = (space, name)
        elif isinstance(
            held, (ContextVar, threading.local, *CONTAINERS, *ARRAYS, *RANDOM, *NUMBERS, Tensor)
        ) or kind_of(held) in ("object", "moving"):
            found[id(space), name] = (space, name)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def base_of(value: object) -> type:
    """The builtin container whose methods read and fill a value, whatever its class does in them."""
    if type(value) in BUILTIN:
        return type(value)
    return next(kind for kind in (OrderedDict, *CONTAINERS) if isinstance(value, kind))
