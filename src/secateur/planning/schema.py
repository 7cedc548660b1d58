"""What a plan's file may hold: every type, bound and length, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import FileRefusedError
from secateur.files.seeds import canonical_json
from secateur.planning.encode import MAX_KEPT
from secateur.types import Certificate

SCHEMA = 1
MAX_BYTES = 2**30
MAX_SIZE = 2**40  # of one dimension, count or cost
MAX_REMOVED = 2**23  # units that go: they are held as Python integers
MAX_REQUEST = 2**20  # characters of the request

Name = Annotated[str, Field(max_length=4096)]
Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Cost = Annotated[int, Field(ge=0, le=2**63 - 1)]
Place = Annotated[int, Field(ge=0, le=2**31)]
Run = Annotated[list[Size], Field(min_length=2, max_length=2)]
Dim = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]?)$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FilePart(BaseModel):
    """Base of every part: exact types, no unknown keys, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class GroupPart(FilePart):
    """What goes from one group."""

    granularity: Name
    size: Annotated[int, Field(ge=1, le=MAX_SIZE)]
    removed: list[Run]


class IntegerPart(FilePart):
    """An integer on a module or config: what it becomes, or what it was."""

    owner: Name
    name: Name
    item: Place | None
    value: Size


class WasPart(IntegerPart):
    """An integer that the decision relies on; null is a config's own default, and what is no size may be below 0."""

    value: Annotated[int, Field(ge=-MAX_SIZE, le=MAX_SIZE)] | None  # type: ignore[assignment]


class MaskPart(FilePart):
    """A mask as bits."""

    shape: Annotated[list[Size], Field(max_length=64)]
    kept: Size
    bits: Annotated[str, Field(max_length=MAX_BYTES)]


class StubPart(FilePart):
    """What takes the place of a module of a branch."""

    items: Annotated[int, Field(ge=0, le=64)]


class LayerPart(FilePart):
    """What goes from one stack of blocks: blocks, or branches of blocks."""

    size: Annotated[int, Field(ge=2, le=2**20)]
    removed: list[Place]
    lists: list[Annotated[list[Name], Field(min_length=2, max_length=2)]]
    stubs: dict[Name, StubPart] = {}


class UnitsPart(FilePart):
    """How many units go."""

    what: Name
    removed: Cost
    total: Cost
    sparsity: Annotated[float, Field(ge=0, le=1)]


class ScalePart(FilePart):
    """A factor on part of a tensor."""

    tensor: Name
    dim: Annotated[int, Field(ge=0, lt=64)]
    start: Place
    stop: Size
    factor: Annotated[float, Field(gt=1e-6, lt=1e6)]


class LeftOutPart(FilePart):
    """A weight that the masks do not cover."""

    name: Name
    params: Cost
    why: Annotated[str, Field(max_length=MAX_REQUEST)]
    hint: Annotated[str, Field(max_length=MAX_REQUEST)]
    wanted: bool


class ConditionPart(FilePart):
    """What the run that the plan was learned from depended on."""

    text: Annotated[str, Field(max_length=MAX_REQUEST)]
    where: Annotated[str, Field(max_length=MAX_REQUEST)]
    module: Annotated[str, Field(max_length=MAX_REQUEST)]


class TensorsPart(FilePart):
    """The file beside a plan that holds its masks and new weights."""

    file: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]{0,255}$")]
    sha256: Hash


class PlanPart(FilePart):
    """A whole plan."""

    schema_: Literal[1] = Field(alias="schema")
    fingerprint: Hash
    model: Name
    request: dict[str, object]
    groups: dict[Name, GroupPart]
    cuts: dict[Name, dict[Dim, Annotated[list[Run], Field(min_length=1)]]]  # something always stays
    attributes: list[IntegerPart]
    sizes: list[WasPart]
    scales: list[ScalePart]
    masks: dict[Name, MaskPart]
    layers: dict[Name, LayerPart]
    weights: list[Name] = []
    tensors: TensorsPart | None = None
    units: UnitsPart
    cost: dict[Literal["params", "macs"], Annotated[list[Cost], Field(min_length=2, max_length=2)]]
    left_out: list[LeftOutPart]
    conditions: list[ConditionPart]
    certificate: dict[str, object] | None
    decision: Hash | None


class _Recorded(FilePart):
    certificate: Certificate


def check_plan(data: object, origin: str) -> Mapping[str, object]:
    """Refuse what is no plan, or asks for more than a plan may.

    Args:
        data: what a JSON reader gave.
        origin: what the file is called in errors.

    Returns:
        `data`, of which every type and bound is known now.

    Raises:
        FileRefusedError: names the place and what is wrong with it.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or type(data["schema"]) is not int:
        said = repr(data.get("schema"))[:80] if isinstance(data, dict) else ""
        raise FileRefusedError(
            f"{origin} is not a secateur plan of schema {SCHEMA}.",
            why=f"schema is {said}" if said else "it is not a JSON object",
        )
    try:
        PlanPart.model_validate(data)
    except ValidationError as error:
        raise damaged(origin, _first(error)) from None
    kept = _spelt_out(runs for dims in data["cuts"].values() for runs in dims.values())
    removed = _spelt_out(group["removed"] for group in data["groups"].values())
    for what, count, most in (("cuts keep", kept, MAX_KEPT), ("groups remove", removed, MAX_REMOVED)):
        if count > most:
            raise damaged(origin, f"its {what} {count} indices, at most {most} are read")
    if len(canonical_json(data["request"])) > MAX_REQUEST:
        raise damaged(origin, f"its request is longer than {MAX_REQUEST} characters")
    return data


def _spelt_out(lists: Iterable[list[list[int]]]) -> int:
    flat = np.asarray(list(chain.from_iterable(chain.from_iterable(lists))), np.int64)
    return int((flat[1::2] - flat[::2]).clip(min=0).sum())


def check_certificate(data: object, origin: str) -> Certificate:
    """The certificate that a file records.

    Raises:
        FileRefusedError: a field is missing, unknown, or out of its bounds.
    """
    try:
        # As JSON, in which a list may stand for a tuple.
        return _Recorded.model_validate_json(canonical_json({"certificate": data})).certificate
    except ValidationError as error:
        raise damaged(origin, _first(error)) from None


def damaged(origin: str, why: str) -> FileRefusedError:
    """The error for a plan that is none."""
    return FileRefusedError(f"{origin} is a damaged plan.", why=why, hint="Make the plan anew.")


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:80] for part in found["loc"])
    return f"{place!r}: {found['msg'][:200]}"
