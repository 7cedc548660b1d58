"""Functions that remember their answers: one that was asked before does not run again, so what it decides stays unseen.

Whether it has run before is an accident of the process. So nothing in it is watched, and each such function that the
code of a run names is a condition, if anything in it decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

WRAPPER = type(functools.lru_cache(lambda: None))
DEPTH = 3  # functions that call each other


def is_remembered(frame: FrameType | None, until: Callable[[str], bool]) -> bool:
    """Whether a frame runs for a function that remembers its answers.

    Args:
        frame: the innermost one.
        until: file of the frame at which the search ends.
    """
    while frame is not None and not until(frame.f_code.co_filename):
        if _code_of(_named(frame.f_globals, frame.f_code.co_qualname)) is frame.f_code:
            return True
        frame = frame.f_back
    return False


def remembering(code: CodeType, space: dict[str, Any], decides: Callable[[CodeType], bool]) -> Iterator[CodeType]:
    """Functions that remember their answers and that code names, of those in which something decides.

    Args:
        code: that ran.
        space: its global variables.
        decides: whether a piece of code decides anything.
    """
    named = [space.get(name) for name in code.co_names]
    kinds = [*named, _named(space, code.co_qualname.rpartition(".")[0])]  # a method names those beside it
    bases = (base for kind in kinds if isinstance(kind, type) for base in kind.__mro__)
    methods = [vars(base)[name] for base in bases for name in code.co_names if name in vars(base)]
    for value in (*named, *methods):
        found = _code_of(value)
        if found is not None and _decides(value, decides, DEPTH):
            yield found


def _decides(function: object, decides: Callable[[CodeType], bool], depth: int) -> bool:
    function = getattr(_plain(function), "__wrapped__", function)
    if not isinstance(function, FunctionType) or depth == 0:
        return False
    names = (function.__globals__.get(name) for name in function.__code__.co_names)
    return decides(function.__code__) or any(_decides(each, decides, depth - 1) for each in names)


def _named(space: dict[str, Any], name: str) -> object:
    """What a qualified name stands for: a function of a module, or a method."""
    first, *rest = name.split(".")
    found = space.get(first)
    for each in rest:
        found = vars(found).get(each) if isinstance(found, type) else None
    return found


def _plain(value: object) -> object:
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _code_of(value: object) -> CodeType | None:
    value = _plain(value)
    if not isinstance(value, WRAPPER):
        return None
    function = value.__wrapped__
    return function.__code__ if isinstance(function, FunctionType) else None
