"""Groups that stay whole because a weight is computed from them: a cut would change the value of the weights that stay.

A weight over its own norm (`weight_norm`, spectral norm, a cosine layer) is computed anew from what is left, so a cut
along the dimension of that norm changes what stays. The second proof refuses such a cut as a whole; found before
anything is decided, it costs these groups alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.kinds.answers import answer
from secateur.kinds.slices.ablation import weights_changed
from secateur.kinds.slices.missing import FORMS
from secateur.model.call import device_of
from secateur.structure.groups import Structure
from secateur.structure.rules.base import MOVED, base_name
from secateur.structure.trace import Step, Trace, numbers_in
from secateur.types import Condition, Example, Group, Lock

LOOKUPS = ("embedding", "index_select", "index", "gather", "select", "slice")  # take rows and mix none
HINT = (
    "write the weight down first (remove_weight_norm, remove_spectral_norm, parametrize.remove_parametrizations), or "
    "leave these groups whole"
)


def lock_computed(model: nn.Module, example: Example, trace: Trace, found: Structure) -> tuple[Condition, ...]:
    """Lock the groups of which half cannot go without a computed weight changing, in `found`.

    Args:
        model: the original.
        example: what one forward takes.
        trace: its run.
        found: what the engine found; its groups are exchanged.

    Returns:
        One condition for each line that uses such a weight, with the groups that stay whole for it.

    Cost: nothing where no weight is computed from weights; else one forward pass, and one more for each group of these
        weights if any of them changes.
    """
    mixed = mixed_weights(trace)
    near = [g for g in found.groups if not g.locks and any(span.tensor in mixed for span in g.spans)]
    if device_of(model).type == "meta" or not near or not _changed(model, example, found, near):
        return ()
    by_line: dict[str, list[str]] = {}
    for group in near:
        for line in _changed(model, example, found, [group])[:1]:
            by_line.setdefault(line, []).append(group.name)
            lock = Lock(f"the weight used {_at(line)} is computed anew from what is left", where=line, hint=HINT)
            found.groups = [replace(g, locks=(lock,)) if g is group else g for g in found.groups]
    return tuple(
        Condition(f"{_stay(names)} whole: the weight used {_at(line)} is computed anew from what is left", line)
        for line, names in by_line.items()
    )


def mixed_weights(trace: Trace) -> set[str]:
    """Names of parameters of which a weight is computed, other than element by element, before any data comes in."""
    of: dict[int, frozenset[str]] = {number: frozenset([name]) for number, name in trace.names.items()}
    found: set[str] = set()
    for step in trace.steps:
        operands = numbers_in((step.args, step.kwargs)) if base_name(step.func) not in FORMS else []
        if all(number in of for number in operands):
            made = frozenset[str]().union(*(of[number] for number in operands))
            of.update((number, made) for number in step.outputs)
            if _mixes(step):
                found |= made
    return found


def _mixes(step: Step) -> bool:
    name = base_name(step.func)
    return torch.Tag.pointwise not in step.func.tags and name not in MOVED and name not in LOOKUPS


def _changed(model: nn.Module, example: Example, found: Structure, groups: Sequence[Group]) -> list[str]:
    """Lines that use a weight of another value where the second half of these groups is gone."""
    stays = {found.atoms[group.name].id: np.arange(group.size) < (group.size + 1) // 2 for group in groups}
    twin, missing = weights_changed(model, found.cuts(stays))
    try:
        answer(twin, example, "eval", lambda: missing)
    except SecateurError:
        return []  # for the proof to say
    return sorted(missing.changed)


def _at(line: str) -> str:
    return f"at {line}" if line else "by a layer of torch"


def _stay(names: Sequence[str]) -> str:
    text = ", ".join(repr(name) for name in names[:4])
    more = f" and {len(names) - 4} others" if len(names) > 4 else ""
    return f"{text}{more} {'stays' if len(names) == 1 else 'stay'}"
