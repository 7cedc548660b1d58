"""The plan: a small pickle-free file that says exactly what is removed, and can be replayed anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from secateur.errors import CertificateError, PlanMismatchError
from secateur.files.atomic import atomic_write
from secateur.files.safe import load_json
from secateur.masks import mask_model
from secateur.model.tensors import named_tensors
from secateur.planning.averages import Averages, migration
from secateur.planning.compose import composed_certificate, composed_cost, composed_edit, composed_groups
from secateur.planning.decision import PlanData, fingerprint
from secateur.planning.explain import diff, explain
from secateur.planning.files import MAX_BYTES, parse, to_json
from secateur.planning.history import origin_of, remember
from secateur.structure.provenance import Attribute, owner_at
from secateur.types import Units


@dataclass(eq=False)
class Plan(PlanData):
    """A decision that can be applied, proved, explained, saved and composed with the next one.

    Args: those of `secateur.planning.decision.PlanData`.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = sc.plan(net, torch.randn(3, 4), target={"sparsity": 0.5})
        >>> plan.apply(net)[0].out_features
        4
    """

    # -- doing --------------------------------------------------------------------------------------------

    def apply(
        self,
        model: nn.Module,
        *,
        inplace: bool = False,
        optimizer: Optimizer | None = None,
        ema: Averages | None = None,
    ) -> nn.Module:
        """Remove for real (or write zeros, where the plan holds masks), and prove it.

        A plan that was made in this process certifies the cut before anything is handed back. A loaded plan is
        checked against the model's names, shapes and dtypes. What is handed back remembers, while it lives, how it
        came from the first model: saved after a second round it still loads onto the original constructor.

        Args:
            model: the model that the plan was made for, or a fresh one of the same architecture.
            inplace: change `model` itself; parameters keep their identity.
            optimizer: with `inplace`, its state is cut alike.
            ema: averaged weights that are cut (or masked) alike: an `AveragedModel`, or a mapping of parameter names
                to tensors, changed in place.

        Returns:
            the smaller model, an ordinary module.

        Raises:
            PlanMismatchError: the plan belongs to another model.
            CertificateError: the cut is not equal to its proof; nothing was changed.

        Cost: one copy of what is kept; certification adds about three forward passes.
        """
        self.validate(model)
        before = origin_of(model)  # asked now: in place, the model is another one afterwards
        # Composed now as well, since it wants the model that this plan was made for; its proof is added once made.
        whole = before.followed(self, model) if isinstance(before, Plan) else self
        known = self.evidence
        proof = known.certify if known is not None and self.removes and model is known.model else None
        result = model if inplace and proof is None else self.edit.copy(model)
        if proof is not None:
            self.certificate = proof(model, result)
        follow = None if ema is None else self._migration(model, ema)
        masks = self.edit.masks_after(model)
        if inplace:
            self.edit.apply(model, optimizer)
            result = model
        if masks:
            mask_model(result, masks, keep_originals=False)
        if follow is not None:
            follow()
        if before is not None:
            whole.certificate = composed_certificate([p.certificate for p in (before, self) if p.removes])
        remember(result, whole)
        return result

    def _migration(self, model: nn.Module, ema: Averages) -> Callable[[], None]:
        def replay(averaged: nn.Module) -> None:
            masks = self.edit.masks_after(averaged)
            self.replay(averaged)
            if masks:
                mask_model(averaged, masks, keep_originals=False)

        return migration(model, ema, replay, cuts=self.cuts, layers=self.layers, masks=self.masks)

    def replay(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Remove slices and layers in place, without a new proof and without masks."""
        self.edit.apply(model, optimizer)

    def validate(self, model: nn.Module) -> None:
        """Check that the plan fits a model.

        Raises:
            PlanMismatchError: names what differs.
        """
        if fingerprint(model) != self.fingerprint:
            raise PlanMismatchError(
                f"The plan was made for another model ({self.model}).",
                why=_difference(self, model),
                hint="Pass a freshly built model of the same architecture and size, not one that is already cut.",
            )
        self.edit.check(model)
        for attribute in self.attributes:
            _require_int(model, attribute)

    def then(self, following: Plan, model: nn.Module) -> Plan:
        """This plan and one that was made for its result, as one plan for the original model.

        Iterative pruning (cut, train, cut again) ends in a plan that `load` can replay onto the constructor:
        ``first.then(second, model)``. Plans of all kinds compose: slices, experts, layers, masks, in any order.

        Args:
            following: a plan for the model that this plan leaves.
            model: the original, or a fresh one; only its names, shapes and dtypes matter.

        Returns:
            the composed plan; certified with the sum of the errors where both are certified.

        Raises:
            PlanMismatchError: the plans do not follow each other.

        Cost: one copy of what the first plan keeps.
        """
        self.validate(model)
        return self.followed(following, self.edit.copy(model))

    def followed(self, following: Plan, between: nn.Module) -> Plan:
        """As `then`, from the model that this plan leaves.

        Raises:
            PlanMismatchError: `following` was not made for `between`.
        """
        if fingerprint(between) != following.fingerprint:
            raise PlanMismatchError(
                "The second plan was not made for the model that the first plan leaves.",
                hint="Make it with the model that first.apply(model) returns.",
            )
        edit = composed_edit(self.edit, following.edit, between)
        groups = composed_groups(self.groups, following.groups, self.layers, between)
        removed = sum(len(group["removed"]) for group in groups.values())
        total = sum(group["size"] for group in groups.values())
        if edit.masks:  # weights are counted then, as every mask knows its own
            removed = sum(int((~mask).sum()) for mask in edit.masks.values())
            total = sum(mask.numel() for mask in edit.masks.values())
        what, before = following.units["what"], replace(self.request, earlier=())
        return Plan(
            fingerprint=self.fingerprint,
            model=self.model,
            request=replace(following.request, earlier=(*self.request.earlier, before, *following.request.earlier)),
            groups=groups,
            cuts=edit.cuts,
            attributes=edit.attributes,
            masks=edit.masks,
            units=Units(what=what, removed=removed, total=total, sparsity=removed / max(total, 1)),
            cost=composed_cost(self.cost, following.cost),
            certificate=composed_certificate([p.certificate for p in (self, following) if p.removes]),
            layers=edit.layers,
            conditions=tuple(dict.fromkeys((*self.conditions, *following.conditions))),
        )

    # -- reading ------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """The plan in words: totals, then one line per group."""
        return explain(self)

    def diff(self, other: Plan) -> str:
        """What `other` decides differently, one line per group or tensor; empty where they agree."""
        return diff(self, other)

    # -- files --------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Canonical JSON: the same decision gives the same bytes."""
        return to_json(self)

    def certify(self) -> None:
        """Make the certificate now, by a trial cut, if it is not there yet.

        Raises:
            CertificateError: the proof fails, or the plan was loaded and has none.
        """
        if not self.removes or self.certificate is not None:
            return
        if self.evidence is None:
            raise CertificateError("The plan has no certificate.", hint="Make it anew with secateur.plan().")
        self.apply(self.evidence.model)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically; makes the certificate first if it is not there yet.

        Raises:
            CertificateError: the proof fails; nothing is written.
        """
        self.certify()
        atomic_write(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; every index and mask is checked, nothing is executed.

        Raises:
            FileRefusedError: not a plan, corrupt, or of an unknown schema.
        """
        return cls.from_data(load_json(path, max_bytes=MAX_BYTES), str(path))

    @classmethod
    def from_data(cls, data: object, origin: str = "plan") -> Plan:
        """The plan of parsed JSON."""
        return parse(cls, data, origin)


def _difference(plan: PlanData, model: nn.Module) -> str:
    have = named_tensors(model)
    missing = sorted(name for name in (*plan.cuts, *plan.masks) if name not in have)
    if missing:
        return f"{type(model).__name__} has no {missing[0]!r}"
    return f"tensor names, shapes or dtypes of this {type(model).__name__} differ"


def _require_int(model: nn.Module, attribute: Attribute) -> None:
    try:
        value = vars(owner_at(model, attribute.owner))[attribute.name]
        value = value if attribute.item is None else value[attribute.item]
    except (KeyError, IndexError, TypeError) as error:
        where = f"{attribute.owner}.{attribute.name}"
        raise PlanMismatchError(f"The plan sets {where}, which this model does not have.") from error
    default = value is None and not isinstance(owner_at(model, attribute.owner), nn.Module)
    if type(value) is not int and not default:
        raise PlanMismatchError(f"The plan sets {attribute.owner}.{attribute.name}, which is not an integer.")
