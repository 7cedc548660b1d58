"""The proof of a plan that was not made with this model here: units are found again, and slices compared.

A plan from a file says which units go, which slices that means, and that it was proved. Only the first is taken from
it. What the units mean is asked of the engine anew, with an example; what the plan cuts must be just that, and the cut
is then certified as that of a new plan is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import PlanMismatchError, SecateurError
from secateur.kinds.base import Candidates, Keep
from secateur.kinds.edit import Edit
from secateur.kinds.experts.kind import Experts
from secateur.kinds.find import KINDS, find
from secateur.kinds.layers.drop import Layers, new_names, stub_names
from secateur.kinds.layers.kind import LayerStacks
from secateur.kinds.layers.sub_blocks import SubBlocks
from secateur.kinds.slices.fold import same_scales
from secateur.kinds.slices.kind import Slices
from secateur.planning.by_hand import begins_later
from secateur.planning.compose import composed_certificate, composed_edit
from secateur.planning.conditions import conditions_of
from secateur.planning.decision import GIVEN, PlanData
from secateur.request import PROOF, Efforts, Named, Request, effort_of
from secateur.structure.provenance import Attribute
from secateur.types import Certificate, Condition, Example, Removal
from secateur.words import SLICES

ORDER = (LayerStacks, SubBlocks, Experts, Slices)


class Proved(NamedTuple):
    """A proof, and what this very proof depends on: another input, or another model, takes other branches."""

    certificate: Certificate
    conditions: tuple[Condition, ...]


class Refound(NamedTuple):
    """Units of one kind, found again."""

    candidates: Candidates
    keep: Keep
    edit: Edit
    before: nn.Module


def prove_anew(
    plan: PlanData,
    original: nn.Module,
    cut: nn.Module,
    example: Example,
    effort: Efforts | None = None,
    *,
    examples: Sequence[Example] = (),
) -> Proved:
    """The proof that `cut` is `original` without the units that a plan names.

    Args:
        plan: from anywhere; its certificate and its record are not asked.
        original: the whole model.
        cut: what the plan's edit made of it.
        example: what one forward takes.
        effort: on which inputs; None: as was asked for here, and not on fewer than usual because a file says so.
        examples: further inputs that it is to hold for.

    Raises:
        PlanMismatchError: the units do not exist here, or the plan's slices are not what they mean.
        CertificateError: the cut model is not the original without them.
        UnsupportedError: the original cannot be captured.

    Cost: one run of the engine per kind of removal in the plan, and the proof of each.
    """
    steps = _found(plan, original, (example, *examples))
    stages = [*(step.before for step in steps[1:]), cut]
    # Terms that were set here hold; a file may ask for more precision and more inputs, and never for a wider tolerance.
    known = plan.evidence
    asked = effort_of(plan.request.proof)
    effort = effort or (asked if known is not None or asked == "full" else PROOF)
    dtype = known.dtype if known is not None else "float64" if _says_float64(plan) else "float32"
    proofs = [
        step.candidates.prove(
            step.before,
            after,
            step.keep,
            dtype=dtype,
            tolerance=None if known is None else known.tolerance,
            effort=effort,
            edit=step.edit,
        )
        for step, after in zip(steps, stages, strict=True)
    ]
    proof = composed_certificate(proofs)
    assert proof is not None
    conditions = [one for step in steps for one in conditions_of(step.candidates, step.keep, step.edit)]
    return Proved(replace(proof, effort=effort), tuple(dict.fromkeys(conditions)))


def _says_float64(plan: PlanData) -> bool:
    return plan.recorded is not None and plan.recorded.dtype == "float64"


def _found(plan: PlanData, original: nn.Module, examples: Sequence[Example]) -> list[Refound]:
    """The plan's units as steps of one kind each, whose edits together are that of the plan."""
    parts: dict[object, dict[str, Removal]] = {}
    for name, group in plan.groups.items():
        if group["removed"]:
            parts.setdefault(KINDS.get(group["granularity"]), {})[name] = group
    if not parts or None in parts:
        raise PlanMismatchError("The plan removes slices without saying which units they belong to.")
    # A composed plan does not say what came first, and a group is called by what is still there: either way will do.
    ways = [[parts[kind] for kind in order if kind in parts] for order in (ORDER, ORDER[::-1])]
    refused: SecateurError | None = None
    # A second step may have known units under another name than the original does; its slices are theirs all the same.
    composed = bool(plan.request.earlier) and Slices in parts
    for way, by_name in [*((way, True) for way in ways[: len(parts)]), *((way, False) for way in ways[:composed])]:
        try:
            return list(_steps(plan, way, original, examples, by_name))
        except SecateurError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _steps(
    plan: PlanData,
    parts: Sequence[Mapping[str, Removal]],
    original: nn.Module,
    examples: Sequence[Example],
    by_name: bool,
) -> Iterator[Refound]:
    whole, before = Edit(), original
    for number, groups in enumerate(parts):
        rename = new_names(original, whole.layers)
        if number:
            groups = {name: group for old, group in groups.items() if (name := _renamed(rename, old)) is not None}
        kinds = {group["granularity"] for group in groups.values()}
        of_slices = not by_name and not kinds.isdisjoint(SLICES)
        candidates = find(before, examples[0], _request(plan, SLICES if of_slices else sorted(kinds)), examples[1:])
        if isinstance(candidates, SubBlocks):  # blocks that go as well take units along: numbers are no names
            keep = _keep_of_branches(candidates, plan, rename)
        else:
            keep = _keep_of_slices(candidates, plan, rename) if of_slices else _keep(candidates, groups)
        if any(request.criterion.name == GIVEN for request in (plan.request, *plan.request.earlier)):
            named = [one for group in candidates.groups if group.name in keep for one in begins_later(group)]
            candidates.conditions = (*candidates.conditions, *named)
        edit = _as_the_plan_says(plan, candidates.write(keep), new_names(original, whole.layers))
        whole = composed_edit(whole, edit, before) if number else edit
        yield Refound(candidates, keep, edit, before)
        before = edit.copy(before) if number < len(parts) - 1 else before
    _require_equal(plan, whole)


def _as_the_plan_says(plan: PlanData, found: Edit, rename: Callable[[str], str | None]) -> Edit:
    """An edit with the plan's own factors where they do the same: steps that follow each other round twice.

    Args:
        plan: says them under the names of the original.
        found: what its units mean here.
        rename: from these names to those of the model that `found` is for.
    """
    said = [replace(scale, tensor=name) for scale in plan.scales if (name := rename(scale.tensor)) is not None]
    return replace(found, scales=said) if same_scales(said, found.scales, found.cuts) else found


def _renamed(rename: Callable[[str], str | None], name: str) -> str | None:
    found = rename(f"{name}.")
    return None if found is None else found.removesuffix(".")


def _request(plan: PlanData, names: Sequence[str]) -> Request:
    return Request(
        target=None,
        granularity=tuple(Named(name) for name in names),
        expressible=plan.request.expressible,
        scales=plan.request.scales,
    )


def _keep(candidates: Candidates, groups: Mapping[str, Removal]) -> dict[str, Tensor]:
    known = {group.name: group for group in candidates.groups}
    result = {}
    for name, removal in groups.items():
        group = known.get(name)
        if group is None or group.size != removal["size"] or group.granularity != removal["granularity"]:
            raise PlanMismatchError(
                f"The plan removes units of {name!r}, which this model does not have, or not as free units.",
                why="is no free group" if group is None else f"it has {group.size} of granularity {group.granularity}",
                hint="Make a new plan for this model: see `secateur inspect` for what is free and what is locked.",
            )
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[removal["removed"]] = False
        stays = candidates.stays(group)
        if stays is not None and bool((stays & ~mask).any()):
            raise PlanMismatchError(f"The plan removes locked units of {name!r}.")
        result[name] = mask.view(group.shape)
    return result


def _keep_of_branches(candidates: SubBlocks, plan: PlanData, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The branches in whose place the plan puts something; a locked one, or half a branch, is refused."""
    gone = {name for old in stub_names(plan.layers) if (name := _renamed(rename, old)) is not None}
    found = {}
    for group in candidates.groups:
        lost = torch.tensor(
            [any(part.name in gone for part in branch.modules) for branch in candidates.branches[group.name]]
        )
        if bool((lost & ~torch.tensor(group.attributes["free"])).any()):
            raise PlanMismatchError(f"The plan removes locked units of {group.name!r}.")
        if bool(lost.any()):
            found[group.name] = ~lost
    return found


def _keep_of_slices(candidates: Candidates, plan: PlanData, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The units of which nothing is left in the plan's slices; whether they are all that goes is seen by the edit."""
    cuts = {name: dims for old, dims in plan.cuts.items() if (name := rename(old)) is not None}
    result = {}
    for group in candidates.groups:
        stays = torch.ones(group.size, dtype=torch.bool)
        for span in group.spans:
            wide = [] if span.index is None else [d for d, n in enumerate(span.index.shape) if n > 1]
            kept = cuts.get(span.tensor, {}).get(wide[0]) if len(wide) == 1 else None
            if span.index is None or kept is None or int(kept.max()) >= span.index.numel():
                break
            stays &= torch.isin(torch.arange(group.size), span.index.flatten()[kept])
        else:
            if not bool(stays.all()):
                result[group.name] = stays.view(group.shape)
    return result


def _require_equal(plan: PlanData, found: Edit) -> None:
    """Refuse a plan that cuts anything else than its units mean."""
    what = _differing_cut(plan, found) or _differing_integer(plan.attributes, found.attributes)
    what = what or ("the factors" if not same_scales(plan.scales, found.scales, plan.cuts) else "")
    if what == "" and _places(plan.layers) != _places(found.layers):
        what = "the blocks"
    if what:
        raise PlanMismatchError(
            f"The plan's units and its slices do not belong together: {what} would be cut otherwise in this model.",
            why="the file was changed by hand, or the model's forward is another one",
            hint="Make the plan anew with secateur.plan().",
        )


def _places(layers: Layers) -> dict[str, object]:
    return {path: (e["size"], e["removed"], e.get("stubs", {})) for path, e in layers.items()}


def _differing_cut(plan: PlanData, found: Edit) -> str:
    for name in sorted({*plan.cuts, *found.cuts}):
        mine, theirs = plan.cuts.get(name, {}), found.cuts.get(name, {})
        if set(mine) != set(theirs) or any(not torch.equal(mine[d], theirs[d]) for d in mine):
            return f"the tensor {name!r}"
    return ""


def _differing_integer(mine: Mapping[Attribute, int], theirs: Mapping[Attribute, int]) -> str:
    for attribute in {**mine, **theirs}:
        if mine.get(attribute) != theirs.get(attribute):
            return f"the integer {f'{attribute.owner}.{attribute.name}'.lstrip('.')!r}"
    return ""
