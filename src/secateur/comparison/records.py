"""What a comparison writes, as typed plain data: one row per run, the summary of all rows, and the manifest.

They are mappings and no classes, since all three are read back from JSON: by a comparison that goes on after a kill,
and by whoever makes pages of finished ones.
"""

from __future__ import annotations

from typing import TypedDict

from secateur.types import Json

# -- single runs -----------------------------------------------------------------------------------------------


class ScoringCost(TypedDict):
    """What the scores of a run cost.

    Args:
        seconds: wall-clock time.
        work_seconds: time that a busy machine does not stretch.
        peak_bytes: memory that scoring added, or None where the system does not tell.
        epochs: the work in passes over the scoring data, or None where there is no loss to pass with.
    """

    seconds: float
    work_seconds: float
    peak_bytes: int | None
    epochs: float | None


class RowLatency(TypedDict):
    """Milliseconds of one forward pass; the fields of `secateur.types.Latency`."""

    median: float
    p10: float
    p90: float
    rounds: int
    threads: int
    batch_size: int
    ratio: list[float] | None


# Not total: a run that was refused or diverged has found nothing, and its row says so by what it lacks.
class Outcome(TypedDict, total=False):
    """What a run found; all of it is missing where the run was refused or diverged.

    Args:
        scoring: cost of the scores; None for the dense model.
        units_removed, units_total: of the granularity.
        sparsity: share of the units that is gone.
        certificate: largest error of the certificate, or None for masks.
        least_kept: share of its units that the thinnest group keeps.
        emptied: groups that keep nothing.
        kept: group -> share of its units that stays.
        params, nonzero, macs: of the pruned model.
        quality: what `evaluate` measured.
        latency_ms, dense_latency_ms: of cut models, timed in turns.
        recovery_seconds, recovery_batches: what recovery took.
        recovery_hash: of all batches that recovery saw, in order.
    """

    scoring: ScoringCost | None
    units_removed: int
    units_total: int
    sparsity: float
    certificate: float | None
    least_kept: float
    emptied: int
    kept: dict[str, float]
    params: int
    nonzero: int
    macs: int
    quality: dict[str, float]
    latency_ms: RowLatency
    dense_latency_ms: RowLatency
    recovery_seconds: float
    recovery_batches: int
    recovery_hash: str


class RunRow(Outcome):
    """One run: what was asked for, how it ended, and what it found.

    Args:
        seed, criterion, variant, level, recovery: which run it is.
        control: whether the criterion was added by the protocol.
        options: of the criterion.
        base: hash of the base model.
        status: "ok", "refused" or "diverged".
        why: the reason where it is not "ok".
        key: address of the result.
    """

    seed: int
    criterion: str
    variant: str
    level: float
    recovery: str
    control: bool
    options: dict[str, Json]
    base: str
    status: str
    why: str
    key: str


# -- the summary -----------------------------------------------------------------------------------------------


# None and not NaN wherever there is no number: JSON has no NaN.
class SeedSpread(TypedDict):
    """A quality over the seeds: mean, standard deviation (n - 1), and how many seeds there are."""

    mean: float | None
    sd: float | None
    seeds: int


class SizeFigures(TypedDict):
    """Means over the seeds of what a level leaves; latency as a share of the dense model's (None = not timed)."""

    params: float
    nonzero: float
    macs: float
    sparsity: float
    least_kept: float
    latency_share: float | None


class CurvePoint(SeedSpread, SizeFigures):
    """A criterion at one level."""

    level: float


class AgainstReference(TypedDict):
    """A paired test against magnitude.

    Args:
        difference: mean over the seeds, None where no seed has both.
        half: half-width of its interval, None where there is no test.
        p: two-sided, None where there is no test.
        p_holm: corrected for the number of criteria.
        verdict: in a word.
    """

    difference: float | None
    half: float | None
    p: float | None
    p_holm: float | None
    verdict: str


class CurveMean(SeedSpread, AgainstReference):
    """A criterion over the whole curve."""

    criterion: str


class BoardLine(CurveMean):
    """A criterion at one level; `leading` = cannot be told from the best there."""

    leading: bool


class Board(TypedDict):
    """The ranking at one level."""

    recovery: str
    level: float
    lines: list[BoardLine]


class RankPair(TypedDict):
    """Kendall's tau of the rankings at two levels; None where one of them is all ties."""

    levels: list[float]
    tau: float | None
    criteria: int


class Gap(TypedDict):
    """A paired difference and the half-width of its interval."""

    difference: float
    half: float | None


# By call, since two of the names are no identifiers.
AblationLine = TypedDict(
    "AblationLine",
    {
        "criterion": str,
        "level": float,
        "as is": float | None,
        "shuffled": float | None,
        "inverted": float | None,
        "over_shuffled": Gap,
        "over_inverted": Gap,
    },
)


class ScoreFidelity(TypedDict):
    """Rank correlation of scores with measured changes of the loss: over all units, and within layers."""

    all: float | None
    within: float | None


class FidelityLine(ScoreFidelity):
    """The same of one criterion, mean over the seeds that know it."""

    criterion: str
    seeds: int


class LayerShares(TypedDict):
    """Share of its units that each group keeps at one level: criterion -> one number per group."""

    level: float
    groups: list[str]
    kept: dict[str, list[float]]


class ScoringLine(TypedDict):
    """What a criterion's scores cost, medians over the seeds."""

    criterion: str
    seconds: float
    epochs: float | None
    peak_bytes: float | None


class CostLine(TypedDict):
    """Scoring and recovery together, medians over the runs."""

    criterion: str
    recovery: str
    seconds: float
    batches: float


class Refusal(TypedDict):
    """Runs of one criterion that have no result, for one reason."""

    criterion: str
    status: str
    why: str
    runs: int
    levels: list[float]


class Pairing(TypedDict):
    """How many recoveries were checked, and those whose runs saw different batches."""

    checked: int
    broken: list[str]


class Summary(TypedDict):
    """Everything that the page says. Keys of `dense`, `curves`, `curve_means`, `rank_agreement` are recoveries."""

    metric: str
    maximize: bool
    seeds: list[int]
    bases: int
    dense: dict[str, SeedSpread]
    curves: dict[str, dict[str, list[CurvePoint]]]
    boards: list[Board]
    curve_means: dict[str, list[CurveMean]]
    rank_agreement: dict[str, list[RankPair]]
    ablations: list[AblationLine]
    fidelity: list[FidelityLine]
    layers: LayerShares
    scoring: list[ScoringLine]
    cost: list[CostLine]
    refused: list[Refusal]
    pairing: Pairing


# -- the manifest ----------------------------------------------------------------------------------------------


# Not all of `Protocol` once more: a page that reads a field says so here, the others are for the reader of the file.
class HeldFixed(TypedDict):
    """The part of the protocol that the page reads; the manifest holds all of it."""

    granularity: str | dict[str, Json]
    match: str
    scope: str
    seeds: list[int]
    probes: int


class Participant(TypedDict):
    """A criterion of the comparison; its name and options stand beside these two."""

    label: str
    control: bool


class ScoringData(TypedDict):
    """What was scored with."""

    batches: int
    samples: int
    hash: str


class RunCounts(TypedDict):
    """Runs in all, and those with a result."""

    total: int
    ok: int


class Machine(TypedDict):
    """Where it ran; the fields of a run report's environment."""

    python: str
    torch: str
    platform: str
    cpu: str
    threads: int
    device: str
    seed: int
    secateur: str


class Manifest(TypedDict):
    """Protocol, hashes and machine: enough to repeat a comparison."""

    schema: int
    title: str
    command: str
    model: str
    protocol: HeldFixed
    criteria: list[Participant]
    scoring: ScoringData
    bases: dict[str, str]
    runs: RunCounts
    environment: Machine
