"""The plan: a small pickle-free file that says exactly what is removed, and can be replayed anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CertificateError, FileRefusedError, PlanMismatchError
from secateur.files.atomic import atomic_write
from secateur.files.safe import load_json
from secateur.files.seeds import canonical_json, stable_hash
from secateur.kinds.layers.drop import Layers, check_layers, drop_copy, drop_layers
from secateur.kinds.slices.cut import Cuts, check, cut_copy, cut_model
from secateur.masks import mask_model
from secateur.model.tensors import named_tensors
from secateur.planning.averages import Averages, migration
from secateur.planning.encode import indices, intervals, pack, unpack
from secateur.structure.groups import Structure
from secateur.structure.provenance import Attribute, owner_at
from secateur.types import Certificate, Example, Group

SCHEMA = 1
MAX_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a plan that was made in this process still knows; never saved.

    Args:
        model: the model that it was made for.
        groups: the groups that competed.
        scores: group name -> scores.
        keep: group name -> bool, True = keep.
        structure: what the engine found, for cuts.
        certify: (original, cut model) -> certificate, for cuts.
        example: the forward inputs that the plan was made with.
    """

    model: nn.Module
    groups: Sequence[Group]
    scores: Mapping[str, Tensor]
    keep: Mapping[str, Tensor]
    structure: Structure | None = None
    certify: Callable[[nn.Module, nn.Module], Certificate] | None = None
    example: Example = None


@dataclass(eq=False)
class Plan:
    """A decision: units to remove, the slices and attributes that follow, masks, and the proof.

    Args:
        fingerprint: hash of the names, shapes and dtypes of the model that it was made for.
        model: class name of that model.
        request: what was asked: criterion, granularity, scope, allocation, target, seed.
        groups: group name -> {"granularity", "size", "removed": unit numbers}.
        cuts: tensor name -> dimension -> kept indices, int64.
        attributes: integers on modules and configs that follow the cut.
        masks: parameter name -> bool mask, True = keep (element-like granularities).
        units: {"what", "removed", "total", "sparsity"} of the stated unit.
        cost: {"params": [before, after], "macs": [before, after]} where cuts are made.
        certificate: the proof, once made.
        evidence: scores and groups, while the process that made the plan lives.
        layers: path of a stack -> {"size", "removed": places, "lists": [[owner, name]] that are shortened alike}.
    """

    fingerprint: str
    model: str
    request: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    cuts: Cuts
    attributes: Mapping[Attribute, int]
    masks: Mapping[str, Tensor]
    units: Mapping[str, Any]
    cost: Mapping[str, list[int]]
    certificate: Certificate | None = None
    evidence: Evidence | None = field(default=None, repr=False)
    layers: Layers = field(default_factory=dict)

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

        A plan that was made in this process certifies the cut against the replay of the original before anything
        is handed back. A loaded plan is checked against the model's names, shapes and dtypes.

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
            CertificateError: the cut is not equal to its replay; nothing was changed.

        Cost: one copy of what is kept; certification adds about three forward passes.
        """
        self.validate(model)
        known = self.evidence
        proof = known.certify if known is not None and self.removes and model is known.model else None
        result = model if inplace and proof is None else self._copy(model)
        if proof is not None:
            self.certificate = proof(model, result)
        follow = None if ema is None else self._migration(model, ema)
        if inplace:
            self.replay(model, optimizer)
            result = model
        if self.masks:
            mask_model(result, self.masks)
        if follow is not None:
            follow()
        return result

    def _migration(self, model: nn.Module, ema: Averages) -> Callable[[], None]:
        def replay(averaged: nn.Module) -> None:
            self.replay(averaged)
            if self.masks:
                mask_model(averaged, self.masks)

        return migration(model, ema, replay, cuts=self.cuts, layers=self.layers, masks=self.masks)

    @property
    def removes(self) -> bool:
        """Whether something goes physically, which needs a certificate."""
        return bool(self.cuts or self.layers)

    def _copy(self, model: nn.Module) -> nn.Module:
        if self.layers:
            return drop_copy(model, self.layers, self.attributes)
        return cut_copy(model, self.cuts, self.attributes)

    def replay(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Remove slices and layers in place, without a new proof and without masks."""
        if self.layers:
            drop_layers(model, self.layers, self.attributes, optimizer)
        else:
            cut_model(model, self.cuts, self.attributes, optimizer)

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
        check(named_tensors(model), self.cuts)
        check_layers(model, self.layers)
        for attribute in self.attributes:
            _require_int(model, attribute)

    def then(self, following: Plan, model: nn.Module) -> Plan:
        """This plan and one that was made for its result, as one plan for the original model.

        Iterative pruning (cut, train, cut again) ends in a plan that `load` can replay onto the constructor:
        ``first.then(second, model)``.

        Args:
            following: a plan for the model that this plan leaves.
            model: the original, or a fresh one; only its names, shapes and dtypes matter.

        Returns:
            the composed plan; certified with the sum of the errors where both are certified.

        Raises:
            PlanMismatchError: the plans do not follow each other.
            UnsupportedError: one of them removes layers, whose names then mean something else.
        """
        from secateur.planning.compose import compose

        return compose(self, following, model)

    # -- reading ------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """The plan in words: totals, then one line per group."""
        units = self.units
        lines = [
            f"{self.model}: removes {units['removed']} of {units['total']} {units['what']} units "
            f"({units['sparsity']:.1%}) by {self.request['criterion']['name']}"
        ]
        for key, (before, after) in self.cost.items():
            lines.append(f"{key}: {before:,} -> {after:,} ({after / max(before, 1):.1%})")
        width = max((len(name) for name in self.groups), default=0)
        for name, group in self.groups.items():
            gone = len(group["removed"])
            lines.append(f"  {name:<{width}}  {group['granularity']:<10} {group['size'] - gone}/{group['size']} kept")
        for name, mask in self.masks.items():
            lines.append(f"  {name}: {int(mask.sum())}/{mask.numel()} weights kept")
        if self.certificate:
            proof = self.certificate
            lines.append(f"certificate: error {proof.max_abs_error:.1e} in {proof.dtype} ({proof.method})")
        return "\n".join(lines)

    def diff(self, other: Plan) -> str:
        """What `other` decides differently, one line per group or tensor; empty where they agree."""
        lines = []
        for name in sorted({*self.groups, *other.groups}):
            mine = set(self.groups.get(name, {}).get("removed", []))
            theirs = set(other.groups.get(name, {}).get("removed", []))
            if mine != theirs:
                lines.append(f"{name}: only here {sorted(mine - theirs)}, only there {sorted(theirs - mine)}")
        for name in sorted({*self.masks, *other.masks}):
            a, b = self.masks.get(name), other.masks.get(name)
            if a is None or b is None:
                lines.append(f"{name}: masked in one plan only")
            elif a.shape != b.shape or bool((a != b).any()):
                count = int((a != b).sum()) if a.shape == b.shape else a.numel()
                lines.append(f"{name}: {count} of {a.numel()} mask entries differ")
        return "\n".join(lines)

    # -- files --------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Canonical JSON: the same decision gives the same bytes."""
        data = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "request": self.request,
            "groups": {name: {**group, "removed": _runs(group["removed"])} for name, group in self.groups.items()},
            "cuts": {name: {str(d): intervals(kept) for d, kept in dims.items()} for name, dims in self.cuts.items()},
            "attributes": [
                {"owner": a.owner, "name": a.name, "item": a.item, "value": v} for a, v in self.attributes.items()
            ],
            "masks": {name: pack(mask) for name, mask in self.masks.items()},
            "layers": {path: dict(entry) for path, entry in self.layers.items()},
            "units": self.units,
            "cost": self.cost,
            "certificate": asdict(self.certificate) if self.certificate else None,
        }
        return canonical_json(data)

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
    def from_data(cls, data: Any, origin: str = "plan") -> Plan:
        """The plan of parsed JSON."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise FileRefusedError(
                f"{origin} is not a secateur plan of schema {SCHEMA}.",
                why=f"schema is {data.get('schema')!r}" if isinstance(data, dict) else "it is not a JSON object",
            )
        try:
            layers = {_text(path): _layer_entry(entry) for path, entry in data.get("layers", {}).items()}
            if layers and (data["cuts"] or data["masks"]):
                raise ValueError("layers stand beside cuts or masks")
            return cls(
                fingerprint=_text(data["fingerprint"]),
                model=_text(data["model"]),
                request=dict(data["request"]),
                groups={
                    name: {**group, "removed": indices(group["removed"], f"group {name!r}").tolist()}
                    for name, group in data["groups"].items()
                },
                cuts={
                    name: {int(d): indices(runs, f"cut of {name!r}") for d, runs in dims.items()}
                    for name, dims in data["cuts"].items()
                },
                attributes={
                    Attribute(_text(a["owner"]), _text(a["name"]), _item(a["item"])): _size(
                        a["value"], least=0 if layers else 1
                    )
                    for a in data["attributes"]
                },
                masks={name: unpack(mask, name) for name, mask in data["masks"].items()},
                units=dict(data["units"]),
                cost=dict(data["cost"]),
                certificate=Certificate(**data["certificate"]) if data["certificate"] else None,
                layers=layers,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileRefusedError(
                f"{origin} is a damaged plan.", why=f"{type(error).__name__}: {error}", hint="Make the plan anew."
            ) from error


def removals(groups: Sequence[Group], keep: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What goes of every group, as a plan holds it: group name -> granularity, size, numbers of removed units."""
    return {
        g.name: {
            "granularity": g.granularity,
            "size": g.size,
            "removed": (~keep[g.name].flatten()).nonzero().flatten().tolist(),
        }
        for g in groups
    }


def counted(what: str, keep: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many units go, as a plan holds it."""
    total = sum(mask.numel() for mask in keep.values())
    gone = total - sum(int(mask.sum()) for mask in keep.values())
    return {"what": what, "removed": gone, "total": total, "sparsity": gone / max(total, 1)}


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes and dtypes of all parameters and buffers."""
    tensors = sorted((n, list(t.shape), str(t.dtype)) for n, t in named_tensors(model).items())
    return stable_hash([list(entry) for entry in tensors])


def _difference(plan: Plan, model: nn.Module) -> str:
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


def _runs(removed: list[int]) -> list[list[int]]:
    import numpy as np

    return intervals(np.asarray(removed, np.int64))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _size(value: Any, *, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is not an integer of at least {least}")
    return value


def _layer_entry(entry: Any) -> dict[str, Any]:
    size, removed, lists = _size(entry["size"], least=2), entry["removed"], entry["lists"]
    if not isinstance(removed, list) or not isinstance(lists, list) or set(entry) != {"size", "removed", "lists"}:
        raise ValueError("an entry of layers is malformed")
    places = [_size(i, least=0) for i in removed]
    if places != sorted(set(places)) or not 0 < len(places) < size or places[-1] >= size:
        raise ValueError("places of layers are out of order or out of range")
    return {"size": size, "removed": places, "lists": [[_text(owner), _text(name)] for owner, name in lists]}


def _item(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{value!r} is not a position")
    return value
