"""A plan as a file: canonical JSON, and back with every value checked; nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np

from secateur.errors import FileRefusedError, SecateurError
from secateur.files.seeds import canonical_json
from secateur.planning.decision import PlanData
from secateur.planning.encode import indices, intervals, pack, unpack
from secateur.request import Request
from secateur.structure.provenance import Attribute
from secateur.types import Certificate, Condition, LayerEntry, Removal, Units

SCHEMA = 1
MAX_BYTES = 2**31
P = TypeVar("P", bound=PlanData)


def to_json(plan: PlanData) -> str:
    """Canonical JSON: the same decision gives the same bytes."""
    return canonical_json(
        {
            "schema": SCHEMA,
            "fingerprint": plan.fingerprint,
            "model": plan.model,
            "request": plan.request.to_data(),
            "groups": {name: {**group, "removed": _runs(group["removed"])} for name, group in plan.groups.items()},
            "cuts": {name: {str(d): intervals(kept) for d, kept in dims.items()} for name, dims in plan.cuts.items()},
            "attributes": [
                {"owner": a.owner, "name": a.name, "item": a.item, "value": v} for a, v in plan.attributes.items()
            ],
            "masks": {name: pack(mask) for name, mask in plan.masks.items()},
            "layers": {path: dict(entry) for path, entry in plan.layers.items()},
            "units": plan.units,
            "cost": plan.cost,
            "certificate": asdict(plan.certificate) if plan.certificate else None,
            "conditions": [asdict(condition) for condition in plan.conditions],
        }
    )


def parse(make: type[P], data: object, origin: str) -> P:
    """The plan of parsed JSON.

    Args:
        make: the class of the plan.
        data: what a JSON reader gave.
        origin: what the file is called in errors.

    Raises:
        FileRefusedError: not a plan, damaged, or of an unknown schema.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise FileRefusedError(
            f"{origin} is not a secateur plan of schema {SCHEMA}.",
            why=f"schema is {data.get('schema')!r}" if isinstance(data, dict) else "it is not a JSON object",
        )
    try:
        return _plan(make, data)
    except FileRefusedError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, SecateurError) as error:
        raise FileRefusedError(
            f"{origin} is a damaged plan.", why=f"{type(error).__name__}: {error}", hint="Make the plan anew."
        ) from error


def _plan(make: type[P], data: Mapping[str, Any]) -> P:
    layers = {_text(path): _layer_entry(entry) for path, entry in data.get("layers", {}).items()}
    return make(
        fingerprint=_text(data["fingerprint"]),
        model=_text(data["model"]),
        request=Request.from_data(data["request"]),
        groups={_text(name): _removal(group, f"group {name!r}") for name, group in data["groups"].items()},
        cuts={
            name: {int(d): indices(runs, f"cut of {name!r}") for d, runs in dims.items()}
            for name, dims in data["cuts"].items()
        },
        attributes={
            # Places of blocks start at 0; what sizes a dimension is at least 1.
            Attribute(_text(a["owner"]), _text(a["name"]), _item(a["item"])): _size(
                a["value"], least=0 if layers else 1
            )
            for a in data["attributes"]
        },
        masks={name: unpack(mask, name) for name, mask in data["masks"].items()},
        units=_units(data["units"]),
        cost={_text(name): [_size(n, least=0) for n in pair] for name, pair in data["cost"].items()},
        certificate=_certificate(data["certificate"]) if data["certificate"] else None,
        layers=layers,
        conditions=tuple(_condition(each) for each in data.get("conditions", [])),  # older plans say none
    )


def _runs(removed: list[int]) -> list[list[int]]:
    return intervals(np.asarray(removed, np.int64))


def _removal(group: Mapping[str, Any], what: str) -> Removal:
    size, removed = _size(group["size"]), indices(group["removed"], what).tolist()
    if removed and removed[-1] >= size:
        raise ValueError(f"{what} has {size} units and removes number {removed[-1]}")
    return Removal(granularity=_text(group["granularity"]), size=size, removed=removed)


def _units(data: Mapping[str, Any]) -> Units:
    removed, total = _size(data["removed"], least=0), _size(data["total"], least=0)
    return Units(what=_text(data["what"]), removed=removed, total=total, sparsity=removed / max(total, 1))


def _certificate(data: Mapping[str, Any]) -> Certificate:
    for name in ("max_abs_error", "tolerance"):
        if isinstance(data[name], bool) or not isinstance(data[name], (int, float)) or data[name] < 0:
            raise ValueError(f"the certificate's {name} is {data[name]!r}")
    for name in ("dtype", "method"):
        _text(data[name])
    return Certificate(**data)


def _condition(data: Mapping[str, Any]) -> Condition:
    return Condition(_text(data["text"]), _text(data["where"]), _text(data["module"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _size(value: Any, *, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is not an integer of at least {least}")
    return value


def _layer_entry(entry: Any) -> LayerEntry:
    size, removed, lists = _size(entry["size"], least=2), entry["removed"], entry["lists"]
    if not isinstance(removed, list) or not isinstance(lists, list) or set(entry) != {"size", "removed", "lists"}:
        raise ValueError("an entry of layers is malformed")
    places = [_size(i, least=0) for i in removed]
    if places != sorted(set(places)) or not 0 < len(places) < size or places[-1] >= size:
        raise ValueError("places of layers are out of order or out of range")
    return LayerEntry(size=size, removed=places, lists=[[_text(owner), _text(name)] for owner, name in lists])


def _item(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{value!r} is not a position")
    return value
