"""From rows to answers: curves, paired differences, groups that cannot be told apart, rank agreement, costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean, median, stdev
from typing import Literal

from secateur.comparison.cells import AS_IS, DENSE, INVERTED, SCRATCH, SHUFFLED
from secateur.comparison.contestants import REFERENCE
from secateur.comparison.fidelity import over_seeds
from secateur.comparison.levels import middle_of
from secateur.comparison.protocol import Protocol
from secateur.comparison.records import (
    AblationLine,
    AgainstReference,
    Board,
    BoardLine,
    CostLine,
    CurveMean,
    CurvePoint,
    FidelityLine,
    Gap,
    LayerShares,
    Pairing,
    RankPair,
    Refusal,
    RunRow,
    ScoreFidelity,
    ScoringCost,
    ScoringLine,
    SeedSpread,
    SizeFigures,
    Summary,
)
from secateur.comparison.recoveries import NO_RECOVERY
from secateur.comparison.significance import Paired, curve_mean, holm, kendall, paired

BETTER, WORSE, SAME, UNTESTED = "better", "worse", "not distinguishable", "not tested"


def summarise(
    rows: Sequence[RunRow],
    protocol: Protocol,
    told: Sequence[Mapping[str, ScoreFidelity]] = (),
    modules: Sequence[str] = (),
) -> Summary:
    """Everything that the report says, as plain data.

    Args:
        rows: results of all runs, also of those that were refused or diverged.
        protocol: of the comparison.
        told: per seed the agreement of every criterion with measured changes of the loss.
        modules: names in the model's order, in which layers are shown.

    Returns:
        ``dense``, ``curves`` (per recovery and criterion), ``boards`` (per recovery and level, with differences to
        magnitude), ``curve_means``, ``rank_agreement``, ``ablations``, ``fidelity``, ``layers`` (what each
        criterion leaves of them), ``scoring``, ``cost``, ``refused``, ``pairing``.
    """
    good = [row for row in rows if row["status"] == "ok"]
    plain = [row for row in good if row["variant"] == AS_IS]
    recoveries = [*protocol.recoveries]
    return {
        "metric": protocol.quality,
        "maximize": protocol.sign > 0,
        "seeds": list(protocol.seeds),
        "bases": len({row["base"] for row in rows}),
        "dense": {r: _spread(list(_by_seed(_where(plain, DENSE, 0.0, r), protocol).values())) for r in recoveries},
        "curves": {r: _curves(plain, protocol, r) for r in recoveries},
        "boards": [
            _board(plain, protocol, recovery, level)
            for recovery in recoveries
            for level in (protocol.levels if recovery == NO_RECOVERY else protocol.recover_levels)
        ],
        "curve_means": {r: _curve_means(plain, protocol, r) for r in recoveries},
        "rank_agreement": {r: _agreement(plain, protocol, r) for r in recoveries},
        "ablations": _ablations(good, protocol),
        "fidelity": _fidelity(told),
        "layers": _layers(plain, protocol, modules),
        "scoring": _scoring(plain),
        "cost": _cost(plain, protocol),
        "refused": _refused(rows),
        "pairing": pairing(good),
    }


def pairing(rows: Sequence[RunRow]) -> Pairing:
    """Whether all recoveries of a seed really saw the same batches, by the hashes that were taken of them."""
    seen: dict[tuple[int, str], set[str]] = {}
    for row in rows:
        if row.get("recovery_hash"):
            seen.setdefault((row["seed"], row["recovery"]), set()).add(row["recovery_hash"])
    broken = sorted(f"seed {seed}, {recovery}" for (seed, recovery), hashes in seen.items() if len(hashes) > 1)
    return {"checked": len(seen), "broken": broken}


def methods(rows: Sequence[RunRow]) -> list[str]:
    """Labels of the criteria, in the order of their first run; the dense control is none of them."""
    return [label for label in dict.fromkeys(str(row["criterion"]) for row in rows) if label != DENSE]


def _where(rows: Sequence[RunRow], label: str, level: float, recovery: str) -> list[RunRow]:
    # Training from scratch stands beside the recovered networks of the same size, whatever these are called.
    wanted = SCRATCH if label == SCRATCH and recovery != NO_RECOVERY else recovery
    return [r for r in rows if r["criterion"] == label and r["level"] == level and r["recovery"] == wanted]


def _by_seed(rows: Sequence[RunRow], protocol: Protocol) -> dict[int, float]:
    # By seed, as pairs are made; a seed whose run diverged or was refused is missing, and its pair with it.
    return {row["seed"]: float(row["quality"][protocol.quality]) for row in rows}


def _spread(values: Sequence[float]) -> SeedSpread:
    return {
        "mean": mean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }


def _curves(rows: Sequence[RunRow], protocol: Protocol, recovery: str) -> dict[str, list[CurvePoint]]:
    curves: dict[str, list[CurvePoint]] = {}
    for label in methods(rows):
        points: list[CurvePoint] = []
        for level in protocol.levels:
            found = _where(rows, label, level, recovery)
            if found:
                spread = _spread(list(_by_seed(found, protocol).values()))
                points.append({"level": level, **spread, **_sizes(found)})
        if points:
            curves[label] = points
    return curves


def _sizes(rows: Sequence[RunRow]) -> SizeFigures:
    # Both were timed in the same rounds, so the ratio of a run is worth more than the ratio of two means.
    ratios = [row["latency_ms"]["median"] / row["dense_latency_ms"]["median"] for row in rows if "latency_ms" in row]
    return {
        "params": mean(row["params"] for row in rows),
        "nonzero": mean(row["nonzero"] for row in rows),
        "macs": mean(row["macs"] for row in rows),
        "sparsity": mean(row["sparsity"] for row in rows),
        "least_kept": mean(row["least_kept"] for row in rows),
        "latency_share": median(ratios) if ratios else None,
    }


def _board(rows: Sequence[RunRow], protocol: Protocol, recovery: str, level: float) -> Board:
    """The ranking at one strength, with every method tested against magnitude and against the best."""
    values = {label: _by_seed(_where(rows, label, level, recovery), protocol) for label in methods(rows)}
    values = {label: found for label, found in values.items() if found}
    ranked = _ranked(values, protocol)
    leading = _tied_with_first(values, [line["criterion"] for line in ranked], protocol)
    lines: list[BoardLine] = [{**line, "leading": line["criterion"] in leading} for line in ranked]
    return {"recovery": recovery, "level": level, "lines": lines}


def _ranked(values: Mapping[str, Mapping[int, float]], protocol: Protocol) -> list[CurveMean]:
    """Methods from the best mean to the worst, each tested against magnitude on the seeds that both have."""
    reference = values.get(REFERENCE, {})
    tests = {k: paired(v, reference, confidence=protocol.confidence) for k, v in values.items() if k != REFERENCE}
    # One family per ranking: that is what a reader looks through for a winner.
    corrected = holm({label: test.p for label, test in tests.items()})
    # By name where means are equal, so that the order says nothing that it does not know.
    order = sorted(values, key=lambda label: (-protocol.sign * mean(values[label].values()), label))
    return [
        {
            "criterion": label,
            **_spread(list(values[label].values())),
            **_tested(tests.get(label), corrected.get(label), protocol),
        }
        for label in order
    ]


def _tied_with_first(values: Mapping[str, Mapping[int, float]], order: Sequence[str], protocol: Protocol) -> set[str]:
    """The method with the best mean, and all that a corrected paired test cannot tell from it."""
    if not order:
        return set()
    first = order[0]
    # The best was chosen by looking, so these tests flatter it; they serve to widen the group, not to crown anyone.
    tests = {label: paired(values[label], values[first], confidence=protocol.confidence) for label in order[1:]}
    corrected = holm({label: test.p for label, test in tests.items()})
    alpha = 1 - protocol.confidence
    return {first, *(label for label, p in corrected.items() if p is None or p >= alpha)}


def _tested(test: Paired | None, p: float | None, protocol: Protocol) -> AgainstReference:
    if test is None:
        return {"difference": None, "half": None, "p": None, "p_holm": None, "verdict": "reference"}
    known = not math.isnan(test.mean)
    return {
        "difference": test.mean if known else None,
        "half": test.half,
        "p": test.p,
        "p_holm": p,
        "verdict": _verdict(test, p, protocol),
    }


def _verdict(test: Paired, p: float | None, protocol: Protocol) -> str:
    if p is None:
        # No spread: the same number on every seed is a finding only where that number is 0.
        return SAME if test.pairs > 1 and test.mean == 0 else UNTESTED
    if p >= 1 - protocol.confidence:
        return SAME
    return BETTER if test.mean * protocol.sign > 0 else WORSE


def _curve_means(rows: Sequence[RunRow], protocol: Protocol, recovery: str) -> list[CurveMean]:
    """Area under the curve of quality over log density, per seed, compared in pairs: one test per method."""
    levels = protocol.levels if recovery == NO_RECOVERY else protocol.recover_levels
    areas: dict[str, dict[int, float]] = {}
    for label in methods(rows):
        by_level = {level: _by_seed(_where(rows, label, level, recovery), protocol) for level in levels}
        for seed in protocol.seeds:
            whole = {level: values[seed] for level, values in by_level.items() if seed in values}
            # A curve with a level missing is another curve; its mean would be compared with means over more levels.
            area = curve_mean(whole) if len(whole) == len(levels) else None
            if area is not None:
                areas.setdefault(label, {})[seed] = area
    return _ranked(areas, protocol)


def _agreement(rows: Sequence[RunRow], protocol: Protocol, recovery: str) -> list[RankPair]:
    """Kendall's tau between the rankings at every two strengths."""
    means: dict[float, dict[str, float]] = {}
    for level in protocol.levels:
        for label in methods(rows):
            found = _by_seed(_where(rows, label, level, recovery), protocol)
            # Scratch is no criterion: its place would be the same at every strength.
            if found and label != SCRATCH:
                means.setdefault(level, {})[label] = mean(found.values())
    pairs: list[RankPair] = []
    for low, high in combinations(sorted(means), 2):
        shared = sorted(set(means[low]) & set(means[high]))
        tau = kendall([means[low][k] for k in shared], [means[high][k] for k in shared])
        pairs.append({"levels": [low, high], "tau": tau, "criteria": len(shared)})
    return pairs


def _ablations(rows: Sequence[RunRow], protocol: Protocol) -> list[AblationLine]:
    """What the order of the units within each layer is worth: as is, minus shuffled, minus inverted."""
    found: list[AblationLine] = []
    for level in protocol.ablation_levels:
        for label in methods(rows):
            plain, shuffled, inverted = (
                _by_seed(_where([r for r in rows if r["variant"] == variant], label, level, NO_RECOVERY), protocol)
                for variant in (AS_IS, SHUFFLED, INVERTED)
            )
            if shuffled:
                found.append(
                    {
                        "criterion": label,
                        "level": level,
                        "as is": _spread(list(plain.values()))["mean"],
                        "shuffled": _spread(list(shuffled.values()))["mean"],
                        "inverted": _spread(list(inverted.values()))["mean"],
                        "over_shuffled": _gap(plain, shuffled, protocol),
                        "over_inverted": _gap(plain, inverted, protocol),
                    }
                )
    return found


def _gap(values: Mapping[int, float], other: Mapping[int, float], protocol: Protocol) -> Gap:
    test = paired(values, other, confidence=protocol.confidence)
    return {"difference": test.mean, "half": test.half}


def _fidelity(told: Sequence[Mapping[str, ScoreFidelity]]) -> list[FidelityLine]:
    labels = dict.fromkeys(label for seed in told for label in seed)
    lines = [over_seeds(label, [seed[label] for seed in told if label in seed]) for label in labels]
    # Below every correlation there is: what cannot be said stands last.
    return sorted(lines, key=lambda one: (-(one["all"] if one["all"] is not None else -2.0), one["criterion"]))


def _layers(rows: Sequence[RunRow], protocol: Protocol, modules: Sequence[str]) -> LayerShares:
    """The share of its units that each group keeps at the middle level, mean over the seeds."""
    level = middle_of(protocol.levels)
    place = {name: number for number, name in enumerate(modules)}

    def order(name: str) -> tuple[int, list[tuple[int, str]]]:
        # A group may be called by a part of its module ("attn/heads") or by a parameter of it ("fc.weight").
        module = name.partition("/")[0]
        return place.get(module, place.get(module.rpartition(".")[0], len(place))), _natural(name)

    kept: dict[str, list[float]] = {}
    names: list[str] = []
    for label in methods(rows):
        shares = [row["kept"] for row in _where(rows, label, level, NO_RECOVERY)]
        if shares:
            names = names or sorted(shares[0], key=order)
            kept[label] = [mean(share[name] for share in shares) for name in names]
    return {"level": level, "groups": names, "kept": kept}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _scoring(rows: Sequence[RunRow]) -> list[ScoringLine]:
    """What scoring alone costs, over the seeds."""
    lines: list[ScoringLine] = []
    for label in methods(rows):
        # By seed: every level of a seed repeats what its one scoring cost.
        by_seed = {row["seed"]: row.get("scoring") for row in rows if row["criterion"] == label}
        costs = [cost for cost in by_seed.values() if cost]
        if costs and label != SCRATCH:
            lines.append(
                {
                    "criterion": label,
                    "seconds": median(cost["seconds"] for cost in costs),
                    "epochs": _median(costs, "epochs"),
                    "peak_bytes": _median(costs, "peak_bytes"),
                }
            )
    return sorted(lines, key=lambda line: line["seconds"])


def _median(costs: Sequence[ScoringCost], key: Literal["epochs", "peak_bytes"]) -> float | None:
    known = [value for cost in costs if (value := cost[key]) is not None]
    return median(known) if known else None


def _cost(rows: Sequence[RunRow], protocol: Protocol) -> list[CostLine]:
    """Scoring and recovery together: what each method really took."""
    lines: list[CostLine] = []
    for recovery in protocol.recoveries:
        for label in methods(rows):
            found = [
                (row, cost)
                for row in rows
                if row["criterion"] == label and row["recovery"] == recovery and (cost := row.get("scoring"))
            ]
            if found and recovery != NO_RECOVERY:
                lines.append(
                    {
                        "criterion": label,
                        "recovery": recovery,
                        "seconds": median(cost["seconds"] + row["recovery_seconds"] for row, cost in found),
                        "batches": median(row["recovery_batches"] for row, _ in found),
                    }
                )
    return lines


def _refused(rows: Sequence[RunRow]) -> list[Refusal]:
    """Runs without a result, each reason once."""
    reasons: dict[tuple[str, str, str], list[RunRow]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault((row["criterion"], row["status"], row["why"]), []).append(row)
    return [
        {"criterion": label, "status": status, "why": why, "runs": len(found),
         "levels": sorted({row["level"] for row in found})}
        for (label, status, why), found in reasons.items()
    ]  # fmt: skip
