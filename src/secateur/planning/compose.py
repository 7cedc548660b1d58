"""Two plans that follow each other as one: indices of the second count what the first has kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanMismatchError, UnsupportedError
from secateur.kinds.slices.cut import cut_copy, cut_tensor
from secateur.planning.plan import Plan, fingerprint
from secateur.types import Certificate


def compose(first: Plan, second: Plan, model: nn.Module) -> Plan:
    """See `Plan.then`."""
    if first.layers or second.layers:
        raise UnsupportedError(
            "Plans that remove layers are not composed.",
            why="after a removal the names of the following layers mean other layers",
            hint="Keep both plans, and apply them one after the other.",
        )
    first.validate(model)
    if fingerprint(cut_copy(model, first.cuts, first.attributes)) != second.fingerprint:
        raise PlanMismatchError(
            "The second plan was not made for the model that the first plan leaves.",
            hint="Make it with the model that first.apply(model) returns.",
        )
    groups = _groups(first, second)
    removed = sum(len(group["removed"]) for group in groups.values())
    total = sum(group["size"] for group in groups.values())
    masks = _masks(first, second)
    if masks:
        removed = sum(int((~mask).sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
    return Plan(
        fingerprint=first.fingerprint,
        model=first.model,
        request={**second.request, "steps": [dict(first.request), dict(second.request)]},
        groups=groups,
        cuts=_cuts(first, second),
        attributes={**first.attributes, **second.attributes},
        masks=masks,
        units={"what": second.units["what"], "removed": removed, "total": total, "sparsity": removed / max(total, 1)},
        cost=_cost(first, second),
        certificate=_proof(first, second),
    )


def _cuts(first: Plan, second: Plan) -> dict[str, dict[int, Tensor]]:
    out = {name: dict(dims) for name, dims in first.cuts.items()}
    for name, dims in second.cuts.items():
        for d, kept in dims.items():
            before = out.setdefault(name, {}).get(d)
            out[name][d] = kept if before is None else before[kept]
    return out


def _masks(first: Plan, second: Plan) -> dict[str, Tensor]:
    out = {name: cut_tensor(mask, second.cuts.get(name, {})) for name, mask in first.masks.items()}
    for name, mask in second.masks.items():
        out[name] = out[name] & mask if name in out else mask
    return out


def _groups(first: Plan, second: Plan) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {name: dict(group) for name, group in first.groups.items()}
    for name, group in second.groups.items():
        if name not in out:
            out[name] = dict(group)
            continue
        gone = set(out[name]["removed"])
        stays = [i for i in range(out[name]["size"]) if i not in gone]
        if len(stays) != group["size"]:
            raise PlanMismatchError(f"The plans disagree about the size of the group {name!r}.")
        out[name]["removed"] = sorted(gone | {stays[i] for i in group["removed"]})
    return out


def _cost(first: Plan, second: Plan) -> Mapping[str, list[int]]:
    """A plan of masks has no costs of its own: it leaves them as they are."""
    names = sorted({*first.cost, *second.cost})
    return {n: [(first.cost.get(n) or second.cost[n])[0], (second.cost.get(n) or first.cost[n])[1]] for n in names}


def _proof(first: Plan, second: Plan) -> Certificate | None:
    proofs = [plan.certificate for plan in (first, second) if plan.removes]
    if not proofs or any(proof is None for proof in proofs):
        return None
    known = [proof for proof in proofs if proof is not None]
    return Certificate(
        max_abs_error=sum(proof.max_abs_error for proof in known),
        tolerance=sum(proof.tolerance for proof in known),
        dtype=min((proof.dtype for proof in known), key=lambda dtype: torch.finfo(getattr(torch, dtype)).bits),
        method="composed" if len(known) > 1 else known[0].method,
        outputs=known[-1].outputs,
    )
