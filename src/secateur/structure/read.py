"""Sources as they were read: parsed once, and read again once a file was edited."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

Reading = TypeVar("Reading", bound=Callable[..., Any])
_KEPT: list[Any] = []  # caches of what was read from sources
_READ: dict[str, list[str]] = {}  # file -> its lines as they were read


def kept(function: Reading) -> Reading:
    """A cache of what is read from sources: `renew` empties it once one of them is another."""
    _KEPT.append(lru_cache(maxsize=4096)(function))
    return cast(Reading, _KEPT[-1])


def renew() -> None:
    """Look whether sources were edited since they were read; a model of theirs may have been loaded anew."""
    for name in _READ:
        linecache.checkcache(name)
    if any(linecache.getlines(name) != lines for name, lines in _READ.items()):
        _READ.clear()
        for each in _KEPT:
            each.cache_clear()


def lines_of_file(filename: str) -> list[str]:
    """The lines of a file, or of what stands for one, as they are now."""
    lines = _READ.get(filename)
    if lines is None:
        lines = _READ[filename] = linecache.getlines(filename)
    return lines


@kept
def nodes_of(scope: ast.AST) -> tuple[ast.AST, ...]:
    """Every node of a function, class or file; kept, as the same code is asked over and over again."""
    return tuple(ast.walk(scope))


@kept
def tree_of(filename: str) -> ast.Module:
    """The parsed file; an empty one where there is no source."""
    try:
        return ast.parse("".join(lines_of_file(filename)))
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])
