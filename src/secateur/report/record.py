"""Schema 1 of report.json: everything that a run says about itself, as data.

What stages measure and prove stands in it as they made it (`secateur.types`). Here are the parts that only a report
has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn, Self

from pydantic import AfterValidator, Field, JsonValue, ValidationError
from pydantic import model_validator as check

from secateur import shown
from secateur.errors import EXIT_DEGRADED, EXIT_OK, FileRefusedError, TargetError
from secateur.report.bound import Limit
from secateur.report.part import ReportPart, Share
from secateur.types import Amount, Certificate, Condition, Count, Degradation, LeftOut, Lock, Snapshot, Text

MAX_BYTES = 64 * 1024 * 1024  # many times the largest report; JSON takes ten times that in memory
ZEROS_ONLY = "zeros only: no speed expected"

Applied = Literal["cut", "mask", "packed"]
Status = Literal["ok", "degraded", "target_missed"]


def _finite(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    # Pydantic's own ban on NaN does not reach into free JSON.
    json.dumps(value, allow_nan=False)
    return value


Options = Annotated[dict[str, JsonValue], AfterValidator(_finite)]


class UnitCount(ReportPart):
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


class Choice(ReportPart):
    """A named method with the options that it ran with."""

    name: Text
    options: Options = Field(default_factory=dict)


class Histogram(ReportPart):
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


class Layer(ReportPart):
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


class NetworkPart(ReportPart):
    """A module with weights of its own, before and after.

    Widths are its outputs, 0 where it is gone. ``kept`` is the share of them that stays, or where zeros were written
    the share of its weights that are not zero. ``makes`` and ``reads`` name the groups that its outputs and inputs
    belong to: parts that share one are cut together. ``locked`` says why its outputs may not go, or is empty.
    """

    name: Text
    kind: Text
    width_before: Count
    width_after: Count
    kept: Share
    params_before: Count
    params_after: Count
    makes: tuple[Text, ...] = ()
    reads: tuple[Text, ...] = ()
    locked: Text = ""


@dataclass(frozen=True, kw_only=True)
class Locked(Lock):
    """A part that may not be cut, and why.

    Args:
        name: of the group that is locked.
        params: parameters of which it decides the size.
        reason, op, module, where, hint: as of a `Lock`.
    """

    name: Text
    params: Count

    @classmethod
    def of(cls, name: str, lock: Lock, *, params: int) -> Self:
        """Take over a lock of the structure engine.

        Args:
            name: of the group that is locked.
            lock: the reason.
            params: parameters of which the group decides the size.

        Returns:
            The lock with its place.
        """
        return cls(name=name, params=params, **vars(lock))


class Control(ReportPart):
    """The original after the same recovery steps: what they bring without any pruning."""

    steps: tuple[Text, ...]
    quality: dict[Text, float]


class TrainingPoint(ReportPart):
    """One logged step of a training, with sparsity where it prunes meanwhile; the loss is None where not finite."""

    step: Count
    loss: float | None  # JSON has no NaN, and a point left out would make the curve look whole
    lr: Amount
    quality: float | None = None
    sparsity: float | None = None


class Sample(ReportPart):
    """How a language model goes on from a piece of the test text, before and after, always by the likeliest token."""

    prompt: Text
    before: Text
    after: Text


class Environment(ReportPart):
    """Where the run took place. It holds no host name and no user name."""

    python: Text
    torch: Text
    platform: Text
    cpu: Text
    threads: Count
    device: Text
    seed: int
    secateur: Text


class Report(ReportPart):
    """Everything that a run says about itself: the content of ``report.json``, schema 1.

    ``applied`` says how the decision reached the model: "cut" (parts are gone), "mask" (zeros are stored, so
    no speed is expected) or "packed" (zeros are skipped by a sparse kernel).
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    status: Status
    title: Text
    applied: Applied
    before: Snapshot
    after: Snapshot
    after_cut_quality: dict[Text, float] | None = None
    quality_on: Text = ""
    """Which data the quality figures are of; empty where only the user's own evaluation knows."""
    quality_missing: Text = ""
    """Why there are no quality figures, where there are none."""
    quality_samples: dict[Text, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """On how many samples a figure is a share, where that is known: its interval follows from it."""
    control: Control | None = None
    sample: Sample | None = None
    sparsity: Share
    units: UnitCount
    criterion: Choice
    granularity: Choice
    scope: Text
    allocation: Choice
    target: dict[Text, float] = Field(default_factory=dict)
    achieved: dict[Text, float] = Field(default_factory=dict)
    limit: Limit | None = None
    """What was found for "at most this loss", where that was asked for."""
    certificate: Certificate | None = None
    certificate_reason: Text = ""
    conditions: tuple[Condition, ...] = ()
    degradations: tuple[Degradation, ...] = ()
    seconds: dict[Text, Amount] = Field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    network: tuple[NetworkPart, ...] = ()
    """The parts of the network in its own order, before and after."""
    locked: tuple[Locked, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    """Weights that masks do not cover, each with its reason."""
    model_sparsity: Share | None = None
    """Share of all weights of the model as it came that is gone or zero now; `sparsity` counts what was asked."""
    training: tuple[TrainingPoint, ...] = ()
    warnings: tuple[Text, ...] = ()
    command: Text = ""
    recipe: Options = Field(default_factory=dict)
    environment: Environment
    fingerprint: Text

    @check(mode="after")
    def _consistent(self) -> Self:
        if self.certificate is None and not self.certificate_reason:
            raise ValueError("a report without a certificate says why in certificate_reason")
        if (self.status == "ok" and self.degradations) or (self.status == "degraded" and not self.degradations):
            raise ValueError("status is degraded where, and only where, something was degraded")
        # The figure is stored for readers of the JSON, who shall not meet two that differ.
        if self.sparsity != self.units.sparsity:
            raise ValueError("sparsity is units.removed / units.total")
        return self

    def __repr__(self) -> str:
        gone = f"{self.units.removed:,} of {self.units.total:,} {self.units.what} removed"
        return shown.line("Report", self.title, self.status, gone)

    __str__ = __repr__  # pydantic's own is a page of histograms as well

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
            # Read twice, since pydantic's reader takes keys that occur twice and NaN without a word.
            json.loads(raw, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
            return cls.model_validate_json(raw)
        except ValidationError as error:
            # Inputs and contexts are left out of the message: they come from the file and may be anything.
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the top level"
            raise FileRefusedError(
                f"the report is not schema 1 at {place}",
                why=first["msg"],
                hint="read it with the secateur version that wrote it",
            ) from None
        except (ValueError, RecursionError) as error:
            raise FileRefusedError("the report is not valid JSON", why=str(error)) from None


def json_schema() -> dict[str, object]:
    """Give the JSON Schema (draft 2020-12) of ``report.json``.

    Returns:
        A schema as nested dictionaries.

    Example:
        >>> json_schema()["properties"]["schema"]["const"]
        1
    """
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def status_of(degradations: Iterable[object], *, target_missed: bool) -> Status:
    """Decide the status of a run; a missed target outranks a degradation.

    Args:
        degradations: what was done less well than asked.
        target_missed: whether a target was asked and not reached.

    Returns:
        The value of ``Report.status``.

    Example:
        >>> status_of([], target_missed=False)
        'ok'
    """
    if target_missed:
        return "target_missed"
    return "degraded" if list(degradations) else "ok"


def _no_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Readers of JSON differ in which of two equal keys they believe, so a report must not hold any.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
