"""The plain numbers that a run passes to its operations.

A model may scale by the size of a dimension (`x / x.shape[-1]`, `scores / math.sqrt(head_dim)`). After a cut its code
computes that number anew, so the replay of the original must use the number of the cut model, not the old one. Integers
count only where they are values: as sizes and positions they belong to the full-size replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.structure import rules
from secateur.structure.rules.base import MOVED, base_name
from secateur.structure.trace import Ref, Step

Entry = tuple[Any, tuple[Any, ...], dict[str, Any]]
MADE = "lift_fresh"  # torch.tensor(number) inside a forward


class NumberTape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every call with its plain arguments, in the order in which the engine records steps."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[Entry] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not rules.known(func) and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if MADE in func._schema.name:
            self.entries.append((func, tuple(t.clone() if t.dim() == 0 else None for t in args), {}))
        else:
            plain = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
            self.entries.append((func, tuple(None if isinstance(a, Tensor) else a for a in args), plain))
        return func(*args, **kwargs)


def align(steps: Sequence[Step], entries: Sequence[Entry]) -> list[Entry | None]:
    """The call of the other run for every step, or nothing if the runs differ.

    Calls that only move data are left out: whether a product copies its operands depends on their sizes.
    """
    mine = [i for i, step in enumerate(steps) if base_name(step.func) not in MOVED]
    theirs = [entry for entry in entries if base_name(entry[0]) not in MOVED]
    found: list[Entry | None] = [None] * len(steps)
    if len(mine) != len(theirs):
        return []
    for i, entry in zip(mine, theirs, strict=True):
        if steps[i].func is not entry[0] or len(steps[i].args) != len(entry[1]):
            return []
        found[i] = entry
    return found


def numbers(step: Step, entry: Entry) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a step with the values that the other run used."""
    func, theirs, named = entry
    values = torch.Tag.pointwise in func.tags
    args = [_choose(mine, their, values) for mine, their in zip(step.args, theirs, strict=True)]
    kwargs = {key: _choose(mine, named.get(key, mine), values) for key, mine in step.kwargs.items()}
    return args, kwargs


def _choose(mine: Any, their: Any, values: bool) -> Any:
    if isinstance(mine, Ref):
        return their if isinstance(their, Tensor) else mine
    if type(mine) is float and type(their) is float:
        return their
    return their if values and type(mine) is int and type(their) is int else mine
