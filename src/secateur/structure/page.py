"""The page that `inspect` draws: the network, which slices hang together, and what is locked by what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from secateur.drawing import DrawnPart, environment_of_pages, page_parts, picture
from secateur.shown import shortened
from secateur.structure.parts import ModulePart, together
from secateur.types import Group, MacsPer

_HERE = Path(__file__).parent


def structure_page(
    parts: Sequence[ModulePart],
    groups: Sequence[Group],
    locked: Sequence[Group],
    *,
    model: str,
    params: int,
    macs: int,
    macs_per: MacsPer,
    weights: Mapping[str, int],
    conditions: Sequence[str] = (),
) -> str:
    """One self-contained page; every name in it is untrusted and escaped.

    Args:
        parts: modules with weights, as `module_parts` gives them.
        groups: what can be cut.
        locked: what cannot.
        model: its class name.
        params: of the whole model.
        macs: of the whole model.
        macs_per: "sample" or "example".
        weights: group name -> parameters that go with all its units.
        conditions: what the run depended on.

    Returns:
        The text of the page; write it as UTF-8.
    """
    filters = {"whole": "{:,}".format, "short": lambda text: shortened(text, 80)}
    return (
        environment_of_pages(_HERE, filters)
        .get_template("page.html")
        .render(
            drawing=picture([drawn_part(part) for part in parts], decided=False),
            groups=groups,
            locked=sorted(locked, key=lambda group: -weights[group.name]),
            model=model,
            params=params,
            macs=macs,
            macs_per=macs_per,
            weights=weights,
            conditions=conditions,
            **page_parts(),
        )
    )


def drawn_part(part: ModulePart) -> DrawnPart:
    """A module as a row of the picture, with what it hangs together with."""
    said = [*together(part.makes, part.tensors)]
    said += [f"reads {group.name}" for group in part.reads]
    for group in part.makes:
        said += [
            " ".join(
                word for word in (f"locked: {group.name}:", lock.reason, lock.where and f"at {lock.where}") if word
            )
            + (f". {lock.hint}" if lock.hint else "")
            for lock in group.locks
        ]
    return DrawnPart(
        part.name or "(the model)",
        part.kind,
        part.width,
        makes=[group.name for group in part.makes],
        reads=[group.name for group in part.reads],
        locked=part.locked,
        said=said,
    )
