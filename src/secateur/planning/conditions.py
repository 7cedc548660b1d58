"""What the proof of a choice depends on."""

from __future__ import annotations

from secateur.kinds.base import Candidates, Keep
from secateur.kinds.edit import Edit
from secateur.structure.backwards import own_backwards
from secateur.structure.elsewhere import left_behind, unhooked, untied
from secateur.types import Condition


def conditions_of(candidates: Candidates, keep: Keep, edit: Edit) -> tuple[Condition, ...]:
    """Conditions of one choice among candidates: of the runs that they were found in, of the model, of the edit.

    Args:
        candidates: found on the model, and on the examples, that the cut is proved with.
        keep: group name -> bool, True = the unit stays.
        edit: what follows from it.
    """
    model = candidates.model
    return (
        *(() if candidates.trace is None else candidates.trace.conditions),
        *candidates.conditions,
        *candidates.about(keep, edit),
        *left_behind(model, edit.cuts, edit.attributes),
        *untied(model, edit.cuts),
        *((*own_backwards(model), *unhooked(model)) if candidates.physical else ()),
    )
