"""Schema 1 of report.json: everything that a run says about itself, as data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from pydantic import model_validator as check

from secateur.errors import EXIT_DEGRADED, EXIT_OK, FileRefusedError, TargetError

if TYPE_CHECKING:
    from torch import Tensor

    from secateur import types

MAX_BYTES = 64 * 1024 * 1024
ZEROS_ONLY = "zeros only: no speed expected"


def _well_formed(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


def _finite(value: Any) -> Any:
    json.dumps(value, allow_nan=False)
    return value


Text = Annotated[str, BeforeValidator(_well_formed), Field(max_length=100_000)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Options = Annotated[dict[str, JsonValue], AfterValidator(_finite)]


class Part(BaseModel):
    """Base of every part of a record: strict, frozen, without unknown keys and without NaN."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True)


class Timing(Part):
    """Latency of one forward pass in milliseconds."""

    median: Amount
    p10: Amount
    p90: Amount
    rounds: Count
    threads: Count = 1
    batch_size: Count = 1
    ratio: tuple[Amount, Amount, Amount] | None = None
    """Median, p10 and p90 of this time over that before, round by round."""

    @check(mode="after")
    def _ordered(self) -> Self:
        if not self.p10 <= self.median <= self.p90:
            raise ValueError("latency needs p10 <= median <= p90")
        return self


class State(Part):
    """What the model is before or after: sizes, speed and quality."""

    params: Count
    nonzero: Count
    macs: Count | None
    size_bytes: Count
    latency_ms: Timing | None = None
    quality: dict[Text, float] = Field(default_factory=dict)
    macs_per: Literal["sample", "example"] = "sample"

    @classmethod
    def of(cls, snapshot: types.Snapshot) -> Self:
        """Take over a measured snapshot.

        Args:
            snapshot: what the model was at one moment.

        Returns:
            The same numbers as a part of a record.
        """
        latency = snapshot.latency_ms
        return cls(
            params=int(snapshot.params),
            nonzero=int(snapshot.nonzero),
            macs=None if snapshot.macs is None else int(snapshot.macs),
            size_bytes=int(snapshot.size_bytes),
            latency_ms=None if latency is None else Timing(**vars(latency)),
            quality=numbers(snapshot.quality),
            macs_per=snapshot.macs_per,
        )


class Units(Part):
    """How many units were removed, of how many, and what a unit is."""

    removed: Count
    total: Count
    what: Text

    @check(mode="after")
    def _within(self) -> Self:
        if self.removed > self.total:
            raise ValueError(f"{self.removed} units removed of {self.total}")
        return self

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return self.removed / self.total if self.total else 0.0


class Choice(Part):
    """A named method with the options that it ran with."""

    name: Text
    options: Options = Field(default_factory=dict)


class Proof(Part):
    """Certificate that the cut model equals the original replayed without the removed parts."""

    max_abs_error: Amount
    tolerance: Amount
    dtype: Text
    method: Text
    outputs: Count = 1

    @classmethod
    def of(cls, certificate: types.Certificate) -> Self:
        """Take over a certificate.

        Args:
            certificate: of the verified cut.

        Returns:
            The same facts as a part of a record.
        """
        return cls(**vars(certificate))


class Fallback(Part):
    """Something that was done less well than asked."""

    stage: Text
    what: Text
    why: Text = ""

    @classmethod
    def of(cls, degradation: types.Degradation) -> Self:
        """Take over a degradation.

        Args:
            degradation: as a stage reported it.

        Returns:
            The same words as a part of a record.
        """
        return cls(**vars(degradation))


class Histogram(Part):
    """Counts between edges; one edge more than counts."""

    edges: tuple[float, ...]
    counts: tuple[Count, ...]

    @check(mode="after")
    def _fits(self) -> Self:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError("a histogram has one edge more than counts")
        if any(left > right for left, right in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("the edges of a histogram do not fall")
        return self


class Layer(Part):
    """One pruned tensor: how much went, and how its weights and scores were spread before.

    ``near_zero`` is the share of weights below 1 % of their root mean square; ``score_cut`` the highest score
    that was removed.
    """

    name: Text
    shape: tuple[Count, ...]
    params_before: Count
    params_after: Count
    removed: Count
    total: Count
    sparsity: Share
    near_zero: Share
    weight_histogram: Histogram | None = None
    score_histogram: Histogram | None = None
    score_cut: float | None = None

    @classmethod
    def measure(
        cls,
        name: str,
        weight: Tensor,
        *,
        params_after: int,
        scores: Tensor,
        keep: Tensor,
        bins: int = 40,
    ) -> Self:
        """Measure a layer from the weight before pruning and the decision on its units.

        Args:
            name: of the layer or group.
            weight: before pruning, any shape.
            params_after: elements of the weight that are still stored.
            scores: one per unit, higher = keep.
            keep: bool, the shape of ``scores``, True = keep.
            bins: of both histograms.

        Returns:
            The layer's part of a record.

        Raises:
            NonFiniteError: NaN or Inf in the weight or the scores.

        Cost:
            A few passes over the weight.
        """
        from secateur.report.histogram import histogram, near_zero

        removed = int((~keep).sum())
        return cls(
            name=name,
            shape=tuple(weight.shape),
            params_before=weight.numel(),
            params_after=params_after,
            removed=removed,
            total=keep.numel(),
            sparsity=removed / keep.numel() if keep.numel() else 0.0,
            near_zero=near_zero(weight),
            weight_histogram=histogram(weight, bins),
            score_histogram=histogram(scores, bins),
            score_cut=float(scores[~keep].max()) if removed else None,
        )


class Locked(Part):
    """A part that may not be cut, and why."""

    name: Text
    params: Count
    reason: Text
    op: Text = ""
    module: Text = ""
    where: Text = ""
    hint: Text = ""

    @classmethod
    def of(cls, name: str, lock: types.Lock, *, params: int) -> Self:
        """Take over a lock of the structure engine.

        Args:
            name: of the group or parameter that is locked.
            lock: the reason.
            params: how many parameters it holds.

        Returns:
            The same facts as a part of a record.
        """
        return cls(name=name, params=params, **vars(lock))


class Control(Part):
    """The original after the same recovery steps: what they bring without any pruning."""

    steps: tuple[Text, ...]
    quality: dict[Text, float]


class TrainingPoint(Part):
    """One logged step of recovery; the loss is None where it was not finite."""

    step: Count
    loss: float | None
    lr: Amount
    quality: float | None = None


class Environment(Part):
    """Where the run took place. It holds no host name and no user name."""

    python: Text
    torch: Text
    platform: Text
    cpu: Text
    threads: Count
    device: Text
    seed: int
    secateur: Text


class Record(Part):
    """Everything that a run says about itself: the content of ``report.json``, schema 1.

    ``applied`` says how the decision reached the model: "cut" (parts are gone), "mask" (zeros are stored, so
    no speed is expected) or "packed" (zeros are skipped by a sparse kernel).
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    status: Literal["ok", "degraded", "target_missed"]
    title: Text
    applied: Literal["cut", "mask", "packed"]
    before: State
    after: State
    after_cut_quality: dict[Text, float] | None = None
    quality_on: Text = ""
    """Which data the quality figures are of; empty where only the user's own evaluation knows."""
    quality_missing: Text = ""
    """Why there are no quality figures, where there are none."""
    control: Control | None = None
    sparsity: Share
    units: Units
    criterion: Choice
    granularity: Choice
    scope: Text
    allocation: Choice
    target: dict[Text, float] = Field(default_factory=dict)
    achieved: dict[Text, float] = Field(default_factory=dict)
    certificate: Proof | None = None
    certificate_reason: Text = ""
    degradations: tuple[Fallback, ...] = ()
    seconds: dict[Text, Amount] = Field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    locked: tuple[Locked, ...] = ()
    training: tuple[TrainingPoint, ...] = ()
    warnings: tuple[Text, ...] = ()
    command: Text = ""
    recipe: Options = Field(default_factory=dict)
    environment: Environment
    fingerprint: Text

    @check(mode="after")
    def _consistent(self) -> Self:
        if self.certificate is None and not self.certificate_reason:
            raise ValueError("a record without a certificate says why in certificate_reason")
        if (self.status == "ok" and self.degradations) or (self.status == "degraded" and not self.degradations):
            raise ValueError("status is degraded where, and only where, something was degraded")
        if self.sparsity != self.units.sparsity:
            raise ValueError("sparsity is units.removed / units.total")
        return self

    @property
    def exit_code(self) -> int:
        """Exit status of a run that ends with this record."""
        codes = {"ok": EXIT_OK, "degraded": EXIT_DEGRADED, "target_missed": TargetError.exit_code}
        return codes[self.status]

    def to_json(self) -> str:
        """Write the record as canonical JSON: sorted keys, ASCII, no NaN, one final line feed.

        Returns:
            The text of ``report.json``.
        """
        data = self.model_dump(mode="json")
        return json.dumps(data, sort_keys=True, allow_nan=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, max_bytes: int = MAX_BYTES) -> Self:
        """Read a record that may come from anywhere. Nothing in it is executed or resolved.

        Args:
            text: content of a ``report.json``.
            max_bytes: longer input is refused before it is parsed.

        Returns:
            The validated record.

        Raises:
            FileRefusedError: too long, not JSON, keys twice, NaN, or not schema 1.
        """
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if len(raw) > max_bytes:
            raise FileRefusedError(f"a report of {len(raw):,} bytes is over the limit of {max_bytes:,} bytes")
        try:
            json.loads(raw, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the top level"
            raise FileRefusedError(
                f"the report is not schema 1 at {place}",
                why=first["msg"],
                hint="read it with the secateur version that wrote it",
            ) from None
        except (ValueError, RecursionError) as error:
            raise FileRefusedError("the report is not valid JSON", why=str(error)) from None


def json_schema() -> dict[str, Any]:
    """Give the JSON Schema (draft 2020-12) of ``report.json``.

    Returns:
        A schema as nested dictionaries.

    Example:
        >>> json_schema()["properties"]["schema"]["const"]
        1
    """
    schema = Record.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Turn named numbers of any numeric type into plain floats.

    Args:
        values: name to int, float, numpy scalar or one-element tensor.

    Returns:
        A new dictionary of floats.

    Example:
        >>> numbers({"accuracy": 1})
        {'accuracy': 1.0}
    """
    return {str(name): float(value) for name, value in values.items()}


def status_of(degradations: Iterable[object], *, target_missed: bool) -> Literal["ok", "degraded", "target_missed"]:
    """Decide the status of a run; a missed target outranks a degradation.

    Args:
        degradations: what was done less well than asked.
        target_missed: whether a target was asked and not reached.

    Returns:
        The value of ``Record.status``.

    Example:
        >>> status_of([], target_missed=False)
        'ok'
    """
    if target_missed:
        return "target_missed"
    return "degraded" if list(degradations) else "ok"


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
