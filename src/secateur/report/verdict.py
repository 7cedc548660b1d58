"""The sentence at the top of a report, and the rows below it. What was not measured is not claimed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from secateur.measure.latency import FEWEST_ROUNDS
from secateur.measure.quality import higher_is_better
from secateur.report.intervals import share_interval
from secateur.report.record import Report
from secateur.report.safe_text import clean, count, percent, significant, size
from secateur.types import Latency, Snapshot

LATENCY_LABEL = "latency (p10-p90)"
_SHARES = {
    "accuracy",
    "acc",
    "acc1",
    "acc5",
    "f1",
    "precision",
    "recall",
    "auc",
    "iou",
    "miou",
}
_VERBS = {"cut": "Pruned", "mask": "Masked", "packed": "Pruned"}
_STOPPED = {
    "rounds": "",
    "spread": ", enough for its spread",
    "time": ", all that the time budget allowed",
}
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
class TableRow:
    """One line of the table before/after, as text; ``share`` is after / before, None without a meaning."""

    label: str
    before: str
    after: str
    change: str
    share: float | None = None
    metric: str = ""
    """Name of the quality figure that the row is of."""


@dataclass(frozen=True)
class Direction:
    """The words for a figure that rose and for one that fell."""

    rose: str
    fell: str


COUNT = Direction("more", "fewer")
SIZE = Direction("larger", "smaller")
TIME = Direction("slower", "faster")


@dataclass(frozen=True)
class Speed:
    """Comparison of two latencies.

    Args:
        kind: "faster" and "slower" only where nine of ten rounds say so, or the intervals p10-p90 lie apart, and there
            were six rounds or more.
        words: the claim, for example "1.73x faster".
    """

    kind: Literal["faster", "slower", "same", "zeros", "unmeasured", "incomparable"]
    words: str


def speed(report: Report) -> Speed:
    """Compare the latency before and after, and claim no more than the spread allows.

    A difference counts only if nine of ten rounds show it: before and after are timed in the same round, so a busy
    machine slows both. Without paired rounds the intervals p10-p90 must not touch. And it counts only with at least six
    rounds: were both equally fast, five rounds would all fall alike in one case of 16, six in one of 32, which is the
    first below 5 % (sign test, two sides). A run that only wrote zeros is never called faster.

    Args:
        report: a record with or without latencies.

    Returns:
        The kind of difference, and the words for it.
    """
    before, after = report.before.latency_ms, report.after.latency_ms
    if before is None or after is None:
        words = "zeros only, no speed expected" if report.applied == "mask" else "latency not measured"
        return Speed("zeros" if report.applied == "mask" else "unmeasured", words)
    # One thread before and eight after would be called a gain of the pruning.
    if (before.threads, before.batch_size) != (after.threads, after.batch_size):
        return Speed("incomparable", "measured under different settings, not comparable")
    rounds = min(before.rounds, after.rounds)
    slower, faster = _agreed(before, after)
    # Before the word about zeros: that no gain is expected is no reason to keep a loss to oneself.
    if slower and rounds >= FEWEST_ROUNDS:
        return Speed("slower", _factor_of(before, after))
    if report.applied == "mask":
        return Speed("zeros", "zeros only, no speed expected")
    if rounds < FEWEST_ROUNDS:
        few = f"{rounds} round{'' if rounds == 1 else 's'}"
        return Speed("same", f"not distinguishable ({few}, a difference needs {FEWEST_ROUNDS} that agree)")
    return Speed("faster", _factor_of(before, after)) if faster else Speed("same", "no measurable difference")


def _agreed(before: Latency, after: Latency) -> tuple[bool, bool]:
    """Whether the rounds agree that after is slower, and that it is faster."""
    if after.ratio is None:
        return after.p10 > before.p90, after.p90 < before.p10
    _, low, high = after.ratio
    return low > 1, high < 1


def _factor_of(before: Latency, after: Latency) -> str:
    """How much faster or slower, by the medians that stand beside it."""
    if after.ratio is not None and (after.ratio[0] > 1) != (after.median > before.median):
        # One odd round can swap the medians. The paired rounds, on which the claim rests, cannot disagree with it.
        return _times(1.0, after.ratio[0], TIME)
    return _times(before.median, after.median, TIME)


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
        parts = [
            _count_clause("MACs", before.macs, after.macs),
            _count_clause("parameters", before.params, after.params),
        ]
    parts.append(_latency(report))
    if report.applied != "mask":
        parts.append(f"size {size(before.size_bytes)} -> {size(after.size_bytes)}")
    parts.extend(_quality(report))
    return Verdict(_lead(report), tuple(parts))


def rows(report: Report) -> list[TableRow]:
    """List the figures before and after, with their change.

    Args:
        report: the record of a finished run.

    Returns:
        Rows for parameters, non-zero parameters, MACs, size, latency and every quality figure, each with that of the
        dense control below it where there was one.
    """
    before, after = report.before, report.after
    found = [
        _count_row("parameters", before.params, after.params),
        _count_row("non-zero parameters", before.nonzero, after.nonzero),
        _count_row(f"MACs per {before.macs_per}", before.macs, after.macs),
        _size_row(before.size_bytes, after.size_bytes),
    ]
    if before.latency_ms or after.latency_ms:
        found.append(_latency_row(report))
    for name in _names(before, after):
        found.append(_with_intervals(report, name, _quality_row(name, before, after)))
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
    return _score(value, is_share(name, value))


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


def _latency_row(report: Report) -> TableRow:
    before, after, claim = report.before.latency_ms, report.after.latency_ms, speed(report)
    share = after.median / before.median if before and after and before.median else None
    # No bar for two numbers that must not be compared.
    shown = share if claim.kind != "incomparable" else None
    return TableRow(LATENCY_LABEL, _milliseconds(before), _milliseconds(after), claim.words, shown)


def _milliseconds(timing: Latency | None) -> str:
    return f"{significant(timing.median)} ms ({_spread(timing)})" if timing else "not measured"


def _spread(timing: Latency) -> str:
    return f"{significant(timing.p10)}-{significant(timing.p90)}"


def _settings(timing: Latency) -> str:
    threads = f"{timing.threads} thread{'' if timing.threads == 1 else 's'}"
    return f"{threads}, batch {timing.batch_size}, {timing.rounds} rounds{_STOPPED[timing.stopped or 'rounds']}"


def _names(before: Snapshot, after: Snapshot) -> list[str]:
    return sorted({*before.quality, *after.quality})


def is_share(name: str, *values: float | None) -> bool:
    """Whether a quality figure is a share, by its name and its values."""
    # By name and by value: "accuracy" 91.0 is in percent already, and a "loss" of 0.5 is no share.
    words = re.split(r"[^a-z0-9]+", name.lower())
    named = _SHARES.intersection(words) or any(re.fullmatch(r"top\d+", word) for word in words)
    return bool(named) and all(0 <= value <= 1 for value in values if value is not None)


def _score(value: float | None, share: bool) -> str:
    if value is None:
        return "not measured"
    return percent(value) if share else significant(value, 4)


def _quality_row(name: str, before: Snapshot, after: Snapshot) -> TableRow:
    old, new = before.quality.get(name), after.quality.get(name)
    share = is_share(name, old, new)
    change = "" if old is None or new is None else _quality_change(old, new, share)
    # A bar as a share of the value before means nothing for figures that can be negative.
    ratio = new / old if old is not None and new is not None and old > 0 and new >= 0 else None
    return TableRow(clean(name), _score(old, share), _score(new, share), change, ratio, name)


def _with_intervals(report: Report, name: str, row: TableRow) -> TableRow:
    """How sure each figure is, where it is a share of samples that were counted."""
    samples, values = (
        report.quality_samples.get(name),
        (report.before.quality.get(name), report.after.quality.get(name)),
    )
    if not samples or not is_share(name, *values):
        return row

    def said(text: str, value: float | None) -> str:
        if value is None:
            return text
        return f"{text} ({'-'.join(percent(end).removesuffix(' %') for end in share_interval(value, samples))})"

    return replace(row, before=said(row.before, values[0]), after=said(row.after, values[1]))


def _quality(report: Report) -> list[str]:
    names = _names(report.before, report.after)
    if not names:
        return ["quality not measured" + (f" ({clean(report.quality_missing)})" if report.quality_missing else "")]
    parts = []
    on = f" on {clean(report.quality_on)}" if report.quality_on else ""
    for name in names:
        row = _quality_row(name, report.before, report.after)
        middle = (report.after_cut_quality or {}).get(name)
        share = is_share(name, report.before.quality.get(name), report.after.quality.get(name))
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


def _control_row(name: str, before: Snapshot, reached: float) -> TableRow:
    """The dense model on its way through the same steps: from the same start, to where it came."""
    row = _quality_row(name, before, replace(before, quality={name: reached}))
    return replace(row, label=f"{row.label}, dense control")


def _quality_change(old: float, new: float, share: bool) -> str:
    """How a quality figure moved: in points where it is a share, else in its own unit. Better or worse is not said."""
    if old == new:
        return "unchanged"
    difference = 100 * (new - old) if share else new - old
    sign = "+" if difference > 0 else "-"
    if share:
        # One decimal would write a loss of 0.04 points as none.
        amount = f"{abs(difference):.1f}" if abs(difference) >= 0.05 else significant(abs(difference), 1)
        return f"{sign}{amount} points"
    return f"{sign}{significant(abs(difference))}"


def _count_row(label: str, old: int | None, new: int | None) -> TableRow:
    first, last = ("not counted" if value is None else count(value) for value in (old, new))
    if old is None or new is None:
        return TableRow(label, first, last, "")
    return TableRow(label, first, last, _count_change(old, new, COUNT), new / old if old else None)


def _size_row(old: int, new: int) -> TableRow:
    return TableRow("size", size(old), size(new), _count_change(old, new, SIZE), new / old if old else None)


def _count_clause(what: str, old: int | None, new: int | None) -> str:
    """A count in the verdict, where the figure is named after its change: "2.10x fewer MACs"."""
    if old is None or new is None:
        return f"{what} not counted"
    return f"{what} unchanged" if old == new else _count_change(old, new, COUNT, f" {what}")


def _count_change(old: int, new: int, words: Direction, what: str = "") -> str:
    if old == new:
        return "unchanged"
    # There is no factor to or from nothing.
    return f"{count(old)} -> {count(new)}" if 0 in (old, new) else _times(old, new, words) + what


def _times(old: float, new: float, words: Direction) -> str:
    """A change as a factor: "1.73x faster"; a small one in percent of the old figure."""
    word = words.rose if new > old else words.fell
    if 0 in (old, new):
        return word
    factor = max(old, new) / min(old, new)
    # Below 1.1 a factor hides what happened: 1.03x could be 2.6 % or 3.4 %.
    return f"{significant(factor)}x {word}" if factor >= 1.1 else f"{percent(abs(new - old) / old)} {word}"
