"""A decision as a `Plan`, whoever decided; `solved.py` alone makes those of solvers, which compute weights as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.kinds.base import Candidates, Keep, Left
from secateur.masks.units import resolve
from secateur.model.behaviour import unprovable
from secateur.model.guard import guard
from secateur.planning.conditions import conditions_of
from secateur.planning.decision import GIVEN, Evidence, counted, fingerprint, removals
from secateur.planning.plan import Plan
from secateur.planning.unchanged import settings_of
from secateur.request import Efforts, Named, Request, Target, effort_of
from secateur.structure.provenance import read
from secateur.types import Certificate, Example


def plan_of(
    candidates: Candidates,
    request: Request,
    scores: Mapping[str, Tensor],
    keep: Keep,
    *,
    dtype: str,
    tolerance: float | None,
) -> Plan:
    """The plan of a decision, not yet certified.

    Args:
        candidates: what competed, with the model.
        request: what was asked.
        scores: group name -> scores; empty where the units were given.
        keep: group name -> bool, True = the unit stays.
        dtype: precision of the certificate.
        tolerance: of the certificate; None: by dtype.
    """
    model, edit = candidates.model, candidates.write(keep)
    groups = [group for group in candidates.groups if group.name in keep]
    prove = _prover(candidates, request, keep, dtype, tolerance)
    conditions = conditions_of(candidates, keep, edit)
    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups=removals(groups, keep) if candidates.physical else {},
        cuts=edit.cuts,
        attributes=edit.attributes,
        masks=edit.masks,
        units=counted(request.what, keep),
        cost=_cost(candidates, keep) if candidates.physical else {},
        evidence=Evidence(
            model,
            groups,
            scores,
            keep,
            candidates.structure,
            prove if candidates.physical else None,
            candidates.example,
            dtype,
            tolerance,
            candidates.examples,
            conditions,
            settings_of(model),
        ),
        layers=edit.layers,
        scales=edit.scales,
        left_out=tuple(candidates.left_out),
        # Integers as they are now: a model of equal shapes that reads them otherwise is refused.
        sizes={**{attribute: read(model, attribute) for attribute in edit.attributes}, **edit.sizes},
        conditions=conditions,
    )


def _prover(
    candidates: Candidates, request: Request, keep: Keep, dtype: str, tolerance: float | None
) -> Callable[[nn.Module, nn.Module, Efforts | None], Certificate]:
    """What certifies a cut model against its original, whenever the plan is applied."""

    def prove(original: nn.Module, cut: nn.Module, effort: Efforts | None = None) -> Certificate:
        example, effort = candidates.example, effort or effort_of(request.proof)
        try:
            with guard(original, cut, example=example):
                proof = candidates.prove(original, cut, keep, dtype=dtype, tolerance=tolerance, effort=effort)
                return replace(proof, effort=effort)
        # A model that answers by chance, or an operator that cannot take NaN, may raise anything: what it was is
        # found out afterwards.
        except Exception as error:
            other = unprovable(error, original, example)
            if other is error:
                raise
            raise other from error

    return prove


def _cost(candidates: Candidates, keep: Keep) -> dict[str, list[int]]:
    """What the whole costs, and what stays."""
    whole, left = Left.of({name: torch.ones_like(mask) for name, mask in keep.items()}), Left.of(keep)
    return {what: [candidates.price(what, whole), candidates.price(what, left)] for what in ("params", "macs")}


def plan_of_masks(model: nn.Module, masks: Mapping[str, Tensor], *others: Mapping[str, object] | Target | None) -> Plan:
    """A plan of exactly these masks.

    Raises:
        RecipeError: something else is given that decides.
        InputError: an unknown parameter, or a mask of another shape or dtype.
    """
    if any(other is not None for other in others):
        raise RecipeError("masks= says exactly what goes.", hint="Leave out target, scores, keep and remove.")
    # A plan does not change when its caller writes into the mask later.
    full = {name: mask.expand_as(own).clone() for name, (own, mask) in resolve(model, masks).items()}
    request = Request(target=None, criterion=Named(GIVEN), granularity=(Named("element"),))
    return masked_plan(model, request, full)


def masked_plan(model: nn.Module, request: Request, masks: Mapping[str, Tensor], *, example: Example = None) -> Plan:
    """A plan of masks that were not chosen from candidates: nothing is cut, so nothing is priced or proved."""
    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups={},
        cuts={},
        attributes={},
        masks=masks,
        units=counted(request.what, masks),
        cost={},
        evidence=Evidence(model, [], {}, masks, example=example),
    )
