"""The plan: a small pickle-free file that says exactly what is removed, and can be replayed anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur import shown
from secateur.errors import CertificateError, PlanMismatchError, SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.safe import load_json
from secateur.integrations.transformers import watch_saving
from secateur.kinds.edit import write_weights
from secateur.masks import mask_model
from secateur.masks.living import require_unheld
from secateur.model.admit import admit, not_copyable, require_unwatched
from secateur.model.call import device_of
from secateur.model.closures import require_own_hooks
from secateur.model.tensors import named_tensors
from secateur.planning.again import Proved, prove_anew
from secateur.planning.averages import Averages, migration
from secateur.planning.beside import load_beside, save_beside
from secateur.planning.compose import (
    composed_certificate,
    composed_cost,
    composed_edit,
    composed_groups,
    composed_record,
)
from secateur.planning.decision import PlanData, fingerprint
from secateur.planning.explain import diff, explain
from secateur.planning.files import MAX_BYTES, parse, to_json
from secateur.planning.history import origin_of, remember
from secateur.planning.unchanged import settings_of
from secateur.request import Efforts, effort_of
from secateur.structure.provenance import Attribute, held, owner_at, read
from secateur.types import Certificate, Example, Units


@dataclass(eq=False, repr=False)
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

    def __repr__(self) -> str:
        head = explain(self).splitlines()[0]
        return shown.line("Plan", head, "certified" if self.certificate else "")

    def _repr_html_(self) -> str:
        head, *more = explain(self).splitlines()
        rows = [
            (name, group["granularity"], str(group["size"]), str(group["size"] - len(group["removed"])))
            for name, group in self.groups.items()
        ]
        rows += [(name, "mask", str(mask.numel()), str(int(mask.sum()))) for name, mask in self.masks.items()]
        notes = [said for said in more if not said.startswith("  ")]
        return shown.table(head, ("group", "granularity", "units", "kept"), rows, notes=notes)

    # -- doing --------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # what is made in it could not be trained afterwards
    def apply(
        self,
        model: nn.Module,
        *,
        inplace: bool = False,
        optimizer: Optimizer | None = None,
        ema: Averages | None = None,
        example: Example = None,
        proof: str | None = None,
    ) -> nn.Module:
        """Remove for real (or write zeros, where the plan holds masks), and prove it.

        The cut is proved on this very model before anything is handed back, with the example of the plan or with the
        one that is given. A plan that was read from a file brings no example: without one it is checked against the
        model (names, shapes, dtypes, integers), its `certificate` stays None and `explain` says "not proved here".
        What is handed back remembers, while it lives, how it came from the first model: saved after a second round it
        still loads onto the original constructor.

        Args:
            model: the model that the plan was made for, or a fresh one of the same architecture.
            inplace: change `model` itself; parameters keep their identity.
            optimizer: with `inplace`, its state is cut alike.
            ema: averaged weights that are cut (or masked) alike: an `AveragedModel`, or a mapping of parameter names
                to tensors, changed in place.
            example: what one forward takes, to prove the cut with.
            proof: on which inputs, as `secateur.plan` takes it; None: as the plan was asked for.

        Returns:
            the smaller model, an ordinary module.

        Raises:
            PlanMismatchError: the plan belongs to another model, or its slices are not what its units mean in it.
            CertificateError: the cut is not equal to its proof; nothing was changed.
            UnsupportedError: the model cannot be copied, or is to be cut in place under `DistributedDataParallel`
                or while masks of what is cut are held.

        Cost: one copy of what is kept; certification adds about three forward passes, and on a model that the plan was
            not made with a run of the engine.
        """
        given, model = model, admit(model, prepared=not self.removes)
        if inplace and self.removes:
            require_unwatched(given)
            require_unheld(model, self.cuts, self.layers)
        self.validate(model)
        certify = self._proof(model, example, None if proof is None else effort_of(proof))
        before = origin_of(model)  # asked now: in place, the model is another one afterwards
        # Composed now as well, since it wants the model that this plan was made for; its proof is added once made.
        whole = before.followed(self, model) if isinstance(before, Plan) else self
        result = model if inplace and certify is None else self._copied(model)
        if not inplace:
            require_own_hooks(model, result)
        if certify is not None:
            self.certificate, self.conditions = certify(model, result)
        follow = None if ema is None else self._migration(model, ema)
        masks, weights = self.edit.masks_after(model), self.edit.weights_after(model)
        if inplace:
            # The certified copy goes before the model is cut: beside it stand its kept weights once, and not twice.
            result = model
            self.edit.apply(model, optimizer)
        if weights:
            write_weights(result, weights)
        if masks:
            mask_model(result, masks, keep_originals=False)
        if follow is not None:
            follow()
        if before is not None:
            _compose_proofs(whole, (before, self))
        remember(result, whole)
        if self.removes:
            watch_saving(result)
        return result

    def _copied(self, model: nn.Module) -> nn.Module:
        try:
            return self.edit.copy(model)
        except SecateurError:
            raise
        except Exception as error:
            raise not_copyable(model, error) from error

    def prove(self, model: nn.Module, example: Example, *, proof: str | None = None) -> Certificate | None:
        """Prove the cut anew on a model that stays as it is: whatever a file says of an earlier proof is not asked.

        The units are found again in this model, and the slices and integers that follow from them must be those of the
        plan; then the cut is made on a copy and certified.

        Args:
            model: the model that the plan was made for, or a fresh one of the same architecture.
            example: what one forward takes.
            proof: on which inputs, as `secateur.plan` takes it; None: as the plan was asked for, and not on fewer than
                usual because a file says so.

        Returns:
            the certificate, which the plan then holds; None where nothing is removed.

        Raises:
            PlanMismatchError: the plan belongs to another model, or its slices are not what its units mean in it.
            CertificateError: the cut is not equal to its proof.
            UnsupportedError: the model cannot be captured.

        Cost: one run of the engine, one copy of what is kept, about three forward passes.
        """
        effort = None if proof is None else effort_of(proof)
        self.validate(model)
        if self.removes:
            self.certificate, self.conditions = prove_anew(self, model, self.edit.copy(model), example, effort)
        return self.certificate

    def _proof(
        self, model: nn.Module, example: Example, effort: Efforts | None
    ) -> Callable[[nn.Module, nn.Module], Proved] | None:
        """How the cut is proved on a model; None where nothing is at hand to prove it with."""
        known = self.evidence
        same = known is not None and model is known.model and example is None
        # Set otherwise since (a switch, a hook) it counts as another model, of which the plan's own run says nothing.
        if known is not None and same and settings_of(model) == known.settings:
            certify, conditions = known.certify if self.removes else None, known.conditions
            return None if certify is None else lambda whole, cut: Proved(certify(whole, cut, effort), conditions)
        own = known if example is None else None
        found, more = (example, ()) if own is None else (own.example, own.examples)
        if not self.removes or found is None or device_of(model).type == "meta":
            return None
        return lambda whole, cut: prove_anew(self, whole, cut, found, effort, examples=more)

    def _migration(self, model: nn.Module, ema: Averages) -> Callable[[], None]:
        def replay(averaged: nn.Module) -> None:
            masks = self.edit.masks_after(averaged)
            self.replay(averaged)
            if masks:
                mask_model(averaged, masks, keep_originals=False)

        return migration(model, ema, replay, cuts=self.cuts, layers=self.layers, masks=self.masks, scales=self.scales)

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
        for attribute, before in self.sizes.items():
            _require_size(model, attribute, before)

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
        whole = Plan(
            fingerprint=self.fingerprint,
            model=self.model,
            request=replace(following.request, earlier=(*self.request.earlier, before, *following.request.earlier)),
            groups=groups,
            cuts=edit.cuts,
            attributes=edit.attributes,
            masks=edit.masks,
            units=Units(what=what, removed=removed, total=total, sparsity=removed / max(total, 1)),
            cost=composed_cost(self.cost, following.cost),
            layers=edit.layers,
            left_out=tuple({one.name: one for one in (*self.left_out, *following.left_out)}.values()),
            sizes=edit.sizes,
            scales=edit.scales,
            weights=edit.weights,
            notes=tuple(dict.fromkeys((*self.notes, *following.notes))),
        )
        _compose_proofs(whole, (self, following))
        return whole

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
            raise CertificateError(
                "The plan has no certificate.", hint="Prove it with plan.prove(model, example), or make it anew."
            )
        self.apply(self.evidence.model)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically; makes the certificate first if it is not there yet.

        New values of weights, and masks of more than a few weights, lie in a safetensors file of the same name beside
        it, which the JSON names by its hash.

        A plan that was read from a file and not proved since is written with the record that it came with.

        Raises:
            CertificateError: the proof fails; nothing is written.
        """
        if self.recorded is None:
            self.certify()
        atomic_write(path, to_json(self, save_beside(self, Path(path))))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; every value is checked before anything is made of it, nothing is executed.

        Its certificate is a record (`recorded`) and no proof: `prove` and ``apply(model, example=...)`` make one.

        Raises:
            FileRefusedError: not a plan, corrupt, changed since its proof was recorded, too large, or of an unknown
                schema.
        """
        data = load_json(path, max_bytes=MAX_BYTES)
        return cls.from_data(data, str(path), load_beside(data, Path(path).parent))

    @classmethod
    def from_data(cls, data: object, origin: str = "plan", tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """The plan of parsed JSON, and of the tensors that lie beside it."""
        return parse(cls, data, origin, tensors)


def _difference(plan: PlanData, model: nn.Module) -> str:
    have = named_tensors(model)
    missing = sorted(name for name in (*plan.cuts, *plan.masks) if name not in have)
    if missing:
        return f"{type(model).__name__} has no {missing[0]!r}"
    return f"tensor names, shapes or dtypes of this {type(model).__name__} differ"


def _compose_proofs(whole: PlanData, steps: Sequence[PlanData]) -> None:
    """Give a composed plan the proof and conditions of its steps; where one was not proved here, what is on record."""
    whole.conditions = tuple(dict.fromkeys(one for step in steps for one in step.conditions))
    removing = [step for step in steps if step.removes]
    whole.certificate = composed_certificate([step.certificate for step in removing])
    whole.recorded = composed_record([(step.certificate, step.recorded) for step in removing])


def _require_size(model: nn.Module, attribute: Attribute, before: int | None) -> None:
    where = f"{attribute.owner}.{attribute.name}".lstrip(".")
    try:
        found = read(model, attribute)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PlanMismatchError(f"The plan relies on {where!r}, which this model does not have.") from error
    if found != before:
        raise PlanMismatchError(
            f"The plan was made for a model whose {where!r} is {before}; in this one it is {found}.",
            why="the same slices would mean other units",
            hint="Pass the architecture that the plan was made for, or make a new plan for this one.",
        )


def _require_int(model: nn.Module, attribute: Attribute) -> None:
    try:
        value = held(owner_at(model, attribute.owner), attribute.name)
        value = value if attribute.item is None else value[attribute.item]
    except (KeyError, IndexError, TypeError) as error:
        where = f"{attribute.owner}.{attribute.name}"
        raise PlanMismatchError(f"The plan sets {where}, which this model does not have.") from error
    default = value is None and not isinstance(owner_at(model, attribute.owner), nn.Module)
    if type(value) is not int and not default:
        raise PlanMismatchError(f"The plan sets {attribute.owner}.{attribute.name}, which is not an integer.")
