"""The network before and after, part by part: the picture at the top of a report, as data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from secateur.drawing import DrawnPart
from secateur.model.tensors import named_tensors
from secateur.planning import Plan
from secateur.report.record import Locked, NetworkPart
from secateur.structure.parts import ModulePart, module_parts
from secateur.types import Group

MOST_NAMED = 8  # parts that a row names as hanging together with it


def network_parts(model: nn.Module, plan: Plan) -> list[NetworkPart]:
    """Every module with weights of its own, with what the plan leaves of it.

    Args:
        model: as it came.
        plan: what was decided; one that was read from a file knows no groups, so that nothing hangs together in it.

    Cost: one walk over the modules; masks are counted.
    """
    tensors = named_tensors(model)
    return [_measured(part, plan, tensors) for part in module_parts(model, _groups(plan))]


def drawn_parts(parts: Sequence[NetworkPart], locked: Sequence[Locked]) -> list[DrawnPart]:
    """The same as rows of the picture, each with what it hangs together with."""
    makers: dict[str, list[str]] = {}
    readers: dict[str, list[str]] = {}
    for part in parts:
        for group in part.makes:
            makers.setdefault(group, []).append(part.name)
        for group in part.reads:
            readers.setdefault(group, []).append(part.name)
    held = {one.name: one for one in locked}
    return [
        DrawnPart(
            part.name or "(the model)",
            part.kind,
            part.width_before,
            part.kept,
            part.width_after,
            part.makes,
            part.reads,
            part.locked,
            tuple(_said(part, makers, readers, held)),
        )
        for part in parts
    ]


def _groups(plan: Plan) -> Sequence[Group]:
    """What the engine found. Of masks nothing hangs together: each weight is a group of its own."""
    known = plan.evidence
    if known is None or plan.masks:
        return ()
    return known.groups if known.structure is None else known.structure.groups


def _measured(part: ModulePart, plan: Plan, tensors: Mapping[str, Tensor]) -> NetworkPart:
    whole = sum(tensors[name].numel() for name in part.tensors)
    gone = any(
        part.name == block or part.name.startswith(f"{block}.")
        for path, stack in plan.layers.items()
        for block in (*(f"{path}.{number}" for number in stack["removed"]), *stack.get("stubs", {}))
    )
    left = 0 if gone else sum(_left(tensors[name], plan.cuts.get(name, {})) for name in part.tensors)
    index = plan.cuts.get(part.tensor, {}).get(part.dim)
    after = 0 if gone else part.width if index is None else len(index)
    mask = plan.masks.get(part.tensor)
    return NetworkPart(
        name=part.name,
        kind=part.kind,
        width_before=part.width,
        width_after=after,
        kept=after / max(part.width, 1) if mask is None else float(mask.float().mean()),
        params_before=whole,
        params_after=left,
        makes=tuple(group.name for group in part.makes),
        reads=tuple(group.name for group in part.reads),
        locked=part.locked,
    )


def _left(tensor: Tensor, cuts: Mapping[int, Tensor]) -> int:
    return math.prod(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(tensor.shape))


def _said(
    part: NetworkPart,
    makers: Mapping[str, Sequence[str]],
    readers: Mapping[str, Sequence[str]],
    held: Mapping[str, Locked],
) -> Iterator[str]:
    yield f"parameters {part.params_before:,} → {part.params_after:,}"
    if part.kept != part.width_after / max(part.width_before, 1):
        yield f"{100 * part.kept:.1f} % of its weights are not zero"
    for group in part.makes:
        others = [name for name in makers[group] if name != part.name]
        if others:
            yield f"outputs hang together with those of {_listed(others)}"
        if readers.get(group):
            yield f"outputs are read by {_listed(readers[group])}"
        if group in held:
            lock = held[group]
            yield f"locked: {lock.reason}" + (f" at {lock.where}" if lock.where else "")
    for group in part.reads:
        if makers.get(group):
            yield f"reads what {_listed(makers[group])} make{'s' if len(makers[group]) == 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
