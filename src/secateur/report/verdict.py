"""The sentence at the top of a report, and the rows below it. What was not measured is not claimed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from secateur.measure.quality import higher_is_better
from secateur.report.record import Record as Report
from secateur.report.record import State, Timing
from secateur.report.text import clean, count, percent, significant, size

FEWEST_ROUNDS = 5
_SHARES = {
    "accuracy",
    "acc",
    "acc1",
    "acc5",
    "top1",
    "top5",
    "f1",
    "precision",
    "recall",
    "auc",
    "iou",
    "miou",
}
_VERBS = {"cut": "Pruned", "mask": "Masked", "packed": "Pruned"}
_DONE = {"cut": "removed", "mask": "set to zero", "packed": "left out by a sparse kernel"}


@dataclass(frozen=True)
class Verdict:
    """What a run brought, in words.

    Args:
        lead: what was done, or what went wrong.
        parts: one clause per figure.
    """

    lead: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.lead}: {'; '.join(self.parts)}."


@dataclass(frozen=True)
class Row:
    """One line of the table before/after, as text; ``share`` is after / before, None without a meaning."""

    label: str
    before: str
    after: str
    change: str
    share: float | None = None


@dataclass(frozen=True)
class Speed:
    """Comparison of two latencies.

    Args:
        kind: "faster" and "slower" only where nine of ten rounds say so (or the intervals p10-p90 lie apart).
        words: the claim, for example "1.73x faster".
    """

    kind: Literal["faster", "slower", "same", "zeros", "unmeasured", "incomparable"]
    words: str


def speed(report: Report) -> Speed:
    """Compare the latency before and after, and claim no more than the spread allows.

    A difference counts only with at least five rounds, and only if nine of ten rounds show it: before and after
    are timed in the same round, so a busy machine slows both. Without paired rounds the intervals p10-p90 must not
    touch. A run that only wrote zeros is never called faster.

    Args:
        report: a record with or without latencies.

    Returns:
        The kind of difference, and the words for it.
    """
    before, after = report.before.latency_ms, report.after.latency_ms
    if before is None or after is None:
        words = "zeros only, no speed expected" if report.applied == "mask" else "latency not measured"
        return Speed("zeros" if report.applied == "mask" else "unmeasured", words)
    if (before.threads, before.batch_size) != (after.threads, after.batch_size):
        return Speed("incomparable", "measured under different settings, not comparable")
    fewest = min(before.rounds, after.rounds)
    slower, faster = after.p10 > before.p90, after.p90 < before.p10
    if after.ratio is not None:
        slower, faster = after.ratio[1] > 1, after.ratio[2] < 1
    if slower and fewest >= FEWEST_ROUNDS:
        return Speed("slower", _ratio(after.median, before.median, "slower"))
    if report.applied == "mask":
        return Speed("zeros", "zeros only, no speed expected")
    if fewest < FEWEST_ROUNDS:
        return Speed("same", f"no measurable difference ({fewest} rounds are too few)")
    if faster:
        return Speed("faster", _ratio(before.median, after.median, "faster"))
    return Speed("same", "no measurable difference")


def verdict(report: Report) -> Verdict:
    """Say in one sentence what the run brought, with units and spread.

    Args:
        report: the record of a finished run.

    Returns:
        The sentence in parts; ``str`` of it is the whole.
    """
    before, after = report.before, report.after
    if report.applied == "mask":
        parts = [f"{count(before.nonzero)} -> {count(after.nonzero)} non-zero parameters"]
        parts.append(f"nothing was cut, so the dense model keeps its {count(after.params)} parameters")
    else:
        parts = [_change(before.macs, after.macs, "MACs"), _change(before.params, after.params, "parameters")]
    parts.append(_latency(report))
    if report.applied != "mask":
        parts.append(f"size {size(before.size_bytes)} -> {size(after.size_bytes)}")
    parts.extend(_quality(report))
    return Verdict(_lead(report), tuple(parts))


def rows(report: Report) -> list[Row]:
    """List the figures before and after, with their change.

    Args:
        report: the record of a finished run.

    Returns:
        Rows for parameters, non-zero parameters, MACs, size, latency and every quality figure, each with that of the
        dense control below it where there was one.
    """
    before, after = report.before, report.after
    found = [
        _counts("parameters", before.params, after.params),
        _counts("non-zero parameters", before.nonzero, after.nonzero),
        _counts(f"MACs per {before.macs_per}", before.macs, after.macs),
    ]
    weight = _counts("size", before.size_bytes, after.size_bytes)
    found.append(Row("size", size(before.size_bytes), size(after.size_bytes), weight.change, weight.share))
    if before.latency_ms or after.latency_ms:
        found.append(_latency_row(report))
    for name in _names(before, after):
        found.append(_quality_row(name, before, after))
        if report.control is not None and name in report.control.quality:
            found.append(_control_row(name, before, report.control.quality[name]))
    return found


def score(name: str, value: float) -> str:
    """Write a quality figure: a percentage where the name says that it is a share, else four digits.

    Args:
        name: of the figure, for example "accuracy" or "perplexity".
        value: the figure.

    Returns:
        Text without the name.

    Example:
        >>> score("accuracy", 0.976), score("perplexity", 12.309)
        ('97.6 %', '12.31')
    """
    return _score(value, _is_share(name, value))


def _lead(report: Report) -> str:
    units = report.units
    done = f"{percent(report.sparsity)} of the {clean(units.what)} {_DONE[report.applied]}"
    if report.status == "target_missed":
        reached = {key: f"{significant(value)} reached" for key, value in report.achieved.items()}
        pairs = [
            f"{clean(key)} {significant(asked)} was asked, {reached.get(key, 'nothing measured')}"
            for key, asked in sorted(report.target.items())
        ]
        return f"Target missed ({'; '.join(pairs) or 'no figures recorded'}), {done}"
    if report.status == "degraded":
        several = len(report.degradations)
        return f"Finished but degraded ({several} fallback{'s' if several > 1 else ''}), {done}"
    return f"{_VERBS[report.applied]}, {done}"


def _latency(report: Report) -> str:
    before, after, claim = report.before.latency_ms, report.after.latency_ms, speed(report)
    if before is None or after is None:
        return claim.words
    return (
        f"latency {significant(before.median)} -> {significant(after.median)} ms "
        f"(p10-p90 {_spread(before)} -> {_spread(after)}, {_settings(after)}), {claim.words}"
    )


def _latency_row(report: Report) -> Row:
    before, after, claim = report.before.latency_ms, report.after.latency_ms, speed(report)
    share = after.median / before.median if before and after and before.median else None
    shown = share if claim.kind != "incomparable" else None
    return Row("latency (p10-p90)", _milliseconds(before), _milliseconds(after), claim.words, shown)


def _milliseconds(timing: Timing | None) -> str:
    return f"{significant(timing.median)} ms ({_spread(timing)})" if timing else "not measured"


def _spread(timing: Timing) -> str:
    return f"{significant(timing.p10)}-{significant(timing.p90)}"


def _settings(timing: Timing) -> str:
    threads = f"{timing.threads} thread{'' if timing.threads == 1 else 's'}"
    return f"{threads}, batch {timing.batch_size}, {timing.rounds} rounds"


def _names(before: State, after: State) -> list[str]:
    return sorted({*before.quality, *after.quality})


def _is_share(name: str, *values: float | None) -> bool:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return bool(_SHARES.intersection(words)) and all(0 <= value <= 1 for value in values if value is not None)


def _score(value: float | None, share: bool) -> str:
    if value is None:
        return "not measured"
    return percent(value) if share else significant(value, 4)


def _quality_row(name: str, before: State, after: State) -> Row:
    old, new = before.quality.get(name), after.quality.get(name)
    share = _is_share(name, old, new)
    change = "" if old is None or new is None else _delta(old, new, share)
    ratio = new / old if old is not None and new is not None and old > 0 and new >= 0 else None
    return Row(clean(name), _score(old, share), _score(new, share), change, ratio)


def _quality(report: Report) -> list[str]:
    names = _names(report.before, report.after)
    if not names:
        return ["quality not measured" + (f" ({clean(report.quality_missing)})" if report.quality_missing else "")]
    parts = []
    on = f" on {clean(report.quality_on)}" if report.quality_on else ""
    for name in names:
        row = _quality_row(name, report.before, report.after)
        middle = (report.after_cut_quality or {}).get(name)
        share = _is_share(name, report.before.quality.get(name), report.after.quality.get(name))
        notes = [row.change] if row.change else []
        if middle is not None:
            notes.append(f"{_score(middle, share)} before recovery")
        aside = "; ".join(part for part in (", ".join(notes), _dense(report, name, share)) if part)
        parts.append(f"{row.label}{on} {row.before} -> {row.after}" + (f" ({aside})" if aside else ""))
    return parts


def _dense(report: Report, name: str, share: bool) -> str:
    """What the steps of recovery did for the dense model, or that nobody knows where they may be all of a gain."""
    if report.control is not None and name in report.control.quality:
        return f"the dense model with the same steps reaches {_score(report.control.quality[name], share)}"
    old, new = report.before.quality.get(name), report.after.quality.get(name)
    if not report.training or old is None or new is None:
        return ""
    gained = new > old if higher_is_better(name) else new < old
    return "the dense model was not given the same steps" if gained else ""


def _control_row(name: str, before: State, reached: float) -> Row:
    """The dense model on its way through the same steps: from the same start, to where it came."""
    row = _quality_row(name, before, before.model_copy(update={"quality": {name: reached}}))
    return replace(row, label=f"{row.label}, dense control")


def _delta(old: float, new: float, share: bool) -> str:
    if old == new:
        return "unchanged"
    difference = 100 * (new - old) if share else new - old
    sign = "+" if difference > 0 else "-"
    if share:
        amount = f"{abs(difference):.1f}" if abs(difference) >= 0.05 else significant(abs(difference), 1)
        return f"{sign}{amount} points"
    return f"{sign}{significant(abs(difference))}"


def _counts(label: str, old: int | None, new: int | None) -> Row:
    first, last = ("not counted" if value is None else count(value) for value in (old, new))
    if old is None or new is None:
        return Row(label, first, last, "")
    more, fewer = ("larger", "smaller") if label == "size" else ("more", "fewer")
    return Row(label, first, last, _difference(old, new, more, fewer), new / old if old else None)


def _change(old: int | None, new: int | None, what: str) -> str:
    if old is None or new is None:
        return f"{what} not counted"
    if old == new:
        return f"{what} unchanged"
    return _difference(old, new, f"more {what}", f"fewer {what}")


def _difference(old: int, new: int, more: str, fewer: str) -> str:
    if old == new:
        return "unchanged"
    if min(old, new) == 0:
        return f"{count(old)} -> {count(new)}"
    return _ratio(new, old, more) if new > old else _ratio(old, new, fewer)


def _ratio(large: float, small: float, word: str) -> str:
    if small == 0:
        return word
    ratio = large / small
    # Below 1.1 a factor hides what happened: 1.03x could be 2.6 % or 3.4 %.
    if ratio < 1.1:
        base = small if word.startswith(("more", "larger", "slower")) else large
        return f"{percent((large - small) / base)} {word}"
    return f"{significant(ratio)}x {word}"
