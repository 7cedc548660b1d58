"""Locks that every model has: nothing is wrong with it where only these are seen."""

from __future__ import annotations

from collections.abc import Iterable

from secateur.types import Lock

# Every model has dimensions about which others decide.
_REASONS = ("model's output", "model's input", "spatial dimension")


def aside(locks: Iterable[Lock]) -> str:
    """What is said beside a list of locks that any model of the kind has, empty beside others.

    Args:
        locks: the first reason of each index set that is locked.

    Example:
        >>> aside([Lock("a dimension of the model's input")])
        'normal: inputs, outputs and positions of a model stay'
        >>> aside([Lock("protected by the recipe")])
        ''
    """
    usual = all(any(word in lock.reason for word in _REASONS) for lock in locks)
    return "normal: inputs, outputs and positions of a model stay" if usual else ""
