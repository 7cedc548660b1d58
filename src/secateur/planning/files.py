"""A plan as a file: canonical JSON, and back with every value checked; nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from secateur.errors import FileRefusedError, ResourceError, SecateurError
from secateur.files.parse import MAX_VALUES
from secateur.files.seeds import canonical_json
from secateur.kinds.layers.drop import with_stubs
from secateur.kinds.slices.fold import Scale
from secateur.planning.beside import Beside, described, hash_of, unpacked
from secateur.planning.decision import PlanData
from secateur.planning.encode import indices, intervals, pack, unpack
from secateur.planning.schema import MAX_BYTES, SCHEMA, check_certificate, check_plan, damaged
from secateur.request import Request
from secateur.structure.provenance import Attribute
from secateur.types import Condition, LayerEntry, LeftOut, Removal, Units

__all__ = ["MAX_BYTES", "SCHEMA", "parse", "to_json"]

P = TypeVar("P", bound=PlanData)
# What a proof is about: a record of one that stands beside anything else is none.
DECISION = ("fingerprint", "groups", "cuts", "attributes", "sizes", "scales", "masks", "layers", "weights", "tensors")


def to_json(plan: PlanData, beside: Beside | None = None) -> str:
    """Canonical JSON: the same decision gives the same bytes.

    Args:
        plan: the plan.
        beside: the file that holds its masks and new weights, where there is one. A plan with new weights that is
            written without one names them by their hash, and is no whole plan for a reader.

    Raises:
        ResourceError: the plan is larger than what is read again.
    """
    if beside is None and plan.weights:
        beside = Beside("", hash_of(plan))
    inside = beside is None
    data: dict[str, object] = {
        "schema": SCHEMA,
        "fingerprint": plan.fingerprint,
        "model": plan.model,
        "request": plan.request.to_data(),
        "groups": {name: {**group, "removed": _runs(group["removed"])} for name, group in plan.groups.items()},
        "cuts": {name: {str(d): intervals(kept) for d, kept in dims.items()} for name, dims in plan.cuts.items()},
        "attributes": _integers(plan.attributes),
        "sizes": _integers(plan.sizes),
        "scales": [asdict(scale) for scale in plan.scales],
        "masks": {name: pack(mask) if inside else described(mask) for name, mask in plan.masks.items()},
        "layers": {path: dict(entry) for path, entry in plan.layers.items()},
        "units": plan.units,
        "cost": plan.cost,
        "left_out": [asdict(one) for one in plan.left_out],
        "conditions": [asdict(condition) for condition in plan.conditions],
    }
    if beside is not None:
        data["weights"] = sorted(plan.weights)
        data["tensors"] = {"file": beside.file, "sha256": beside.sha256}
    proof = plan.certificate or plan.recorded
    data["certificate"] = asdict(proof) if proof else None
    data["decision"] = decision_hash(data) if proof else None
    text = canonical_json(data)
    if len(text) > MAX_BYTES or sum(map(text.count, ",[{")) + 3 * text.count(":") > MAX_VALUES:
        raise ResourceError(
            "The plan is too large for a file.",
            why=f"files of at most {MAX_BYTES} bytes and {MAX_VALUES} values are read again",
            hint="Make one plan per part of the model (protect= names the others) and save each.",
        )
    return text


def decision_hash(data: Mapping[str, object]) -> str:
    """SHA-256 of the parts of a plan's data that a proof is about; all of it is plain already."""
    parts = {name: data[name] for name in DECISION if name in data}
    return sha256(json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _integers(values: Mapping[Attribute, int]) -> list[dict[str, object]]:
    # In one order: what the engine found first is no part of the decision.
    known = sorted(values.items(), key=lambda pair: (pair[0].owner, pair[0].name, pair[0].item or 0))
    return [{"owner": a.owner, "name": a.name, "item": a.item, "value": value} for a, value in known]


def parse(make: type[P], data: object, origin: str, tensors: Mapping[str, Tensor] | None = None) -> P:
    """The plan of parsed JSON. Its certificate is a record and no proof.

    Args:
        make: the class of the plan.
        data: what a JSON reader gave.
        origin: what the file is called in errors.
        tensors: of the file beside it, where it names one.

    Raises:
        FileRefusedError: not a plan, damaged, of an unknown schema, or changed since its proof was recorded.
    """
    checked = check_plan(data, origin)
    if checked["certificate"] is not None:
        found = decision_hash(checked)
        if checked["decision"] != found:
            raise FileRefusedError(
                f"{origin} is refused: it was changed after its certificate was made",
                why=f"the certificate is about the decision {checked['decision']}, the file holds {found}",
                hint="Make the plan anew with secateur.plan().",
            )
    try:
        return _plan(make, checked, origin, tensors)
    except FileRefusedError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, SecateurError) as error:
        raise damaged(origin, f"{type(error).__name__}: {error}"[:1000]) from error


def _plan(make: type[P], data: Mapping[str, Any], origin: str, tensors: Mapping[str, Tensor] | None) -> P:
    recorded = data["certificate"]
    if "tensors" in data and tensors is None:
        raise damaged(origin, "its masks and weights lie in a file beside it")
    if "tensors" in data and tensors is not None:
        masks, weights = unpacked(data, tensors)
    else:
        masks, weights = {name: unpack(mask, name) for name, mask in data["masks"].items()}, {}
    return make(
        fingerprint=data["fingerprint"],
        model=data["model"],
        request=Request.from_data(data["request"]),
        groups={name: _removal(group, f"group {name!r}") for name, group in data["groups"].items()},
        cuts={
            name: {int(d): indices(runs, f"cut of {name!r}") for d, runs in dims.items()}
            for name, dims in data["cuts"].items()
        },
        # Places of blocks start at 0; what sizes a dimension is at least 1.
        attributes=_attributes(data["attributes"], least=0 if data["layers"] else 1),
        masks=masks,
        weights=weights,
        units=_units(data["units"]),
        cost=data["cost"],
        layers={path: _layer_entry(entry) for path, entry in data["layers"].items()},
        sizes={Attribute(a["owner"], a["name"], a["item"]): a["value"] for a in data["sizes"]},
        recorded=None if recorded is None else check_certificate(recorded, origin),
        scales=tuple(Scale(**entry) for entry in data["scales"]),
        left_out=tuple(LeftOut(**entry) for entry in data["left_out"]),
        conditions=tuple(Condition(**entry) for entry in data["conditions"]),
    )


def _runs(removed: list[int]) -> list[list[int]]:
    return intervals(np.asarray(removed, np.int64))


def _removal(group: Mapping[str, Any], what: str) -> Removal:
    size, removed = group["size"], indices(group["removed"], what).tolist()
    if removed and removed[-1] >= size:
        raise ValueError(f"{what} has {size} units and removes number {removed[-1]}")
    return Removal(granularity=group["granularity"], size=size, removed=removed)


def _units(data: Mapping[str, Any]) -> Units:
    removed, total = data["removed"], data["total"]
    if removed > total:
        raise ValueError(f"{removed} units are removed of {total}")
    return Units(what=data["what"], removed=removed, total=total, sparsity=removed / max(total, 1))


def _attributes(data: list[Mapping[str, Any]], *, least: int) -> dict[Attribute, int]:
    found = {Attribute(a["owner"], a["name"], a["item"]): a["value"] for a in data}
    if len(found) != len(data):
        raise ValueError("an attribute is set twice")
    low = next((a for a, value in found.items() if value < least), None)
    if low is not None:
        raise ValueError(f"{low.owner}.{low.name} would become {found[low]}")
    return found


def _layer_entry(entry: Mapping[str, Any]) -> LayerEntry:
    places, stubs = entry["removed"], entry.get("stubs", {})
    if places != sorted(set(places)) or len(places) >= entry["size"] or max(places, default=0) >= entry["size"]:
        raise ValueError("places of layers are out of order or out of range")
    if not places and not stubs:
        raise ValueError("nothing goes from a stack of layers")
    return with_stubs(entry["size"], places, [list(pair) for pair in entry["lists"]], dict(stubs))
