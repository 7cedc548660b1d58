"""The report in a terminal: a table where there is one, plain lines where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from secateur.report.limit import limit_lines
from secateur.report.record import Locked, Report, Sample
from secateur.report.safe_text import clean, count, percent, seconds, significant, writable
from secateur.report.verdict import rows, verdict
from secateur.structure.grouped import grouped
from secateur.structure.usual import aside
from secateur.types import Certificate

MOST_LOCKED = 8  # lines; a language model has hundreds, and the report holds them all
_STYLES = {"ok": "bold green", "degraded": "bold yellow", "target_missed": "bold red"}
_HEADS = ("", "before", "after", "change")


def render(report: Report, *, console: Console | None = None, files: Mapping[str, str] | None = None) -> None:
    """Print a report: the verdict first, then the figures, what is locked, fallbacks, warnings and files.

    On a terminal it is a coloured table (no colour under ``NO_COLOR``); elsewhere plain lines, one fact each,
    never wrapped. Names from the model are shown letter by letter: no markup, no escape sequences.

    Args:
        report: the record of a run.
        console: where to print; standard output by default.
        files: what lies where, for example {"report": "out/report.html"}.
    """
    console = console or Console()
    # Pipes and logs get lines that `grep` finds: no boxes, and no wrapping at a width that nobody set.
    if not console.is_terminal or console.is_dumb_terminal:
        for line in plain_lines(report, files=files):
            console.print(_text(console, line), soft_wrap=True)
        return
    sentence = verdict(report)
    head = _text(console, str(sentence))
    head.stylize(_STYLES[report.status], 0, len(sentence.lead))
    console.print(head)
    console.print(_table(report, console))
    for title, lines in _sections(report, files or {}):
        console.print(Text(title, style="bold"))
        for line in lines:
            console.print(Padding(_text(console, line), (0, 0, 0, 2)))


def plain_lines(report: Report, *, files: Mapping[str, str] | None = None) -> list[str]:
    """Give the report as lines of plain text without colour and box drawing.

    Args:
        report: the record of a run.
        files: what lies where.

    Returns:
        Lines without line feeds; the first is the verdict.
    """
    cells = [_HEADS, *((row.label, row.before, row.after, row.change) for row in rows(report))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADS))]
    lines = [str(verdict(report)), ""]
    for label, *values in cells:
        padded = [value.rjust(width) for value, width in zip(values[:2], widths[1:3], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded, values[2]]).rstrip())
    for title, body in _sections(report, files or {}):
        lines += ["", title, *(f"  {line}" for line in body)]
    return lines


def _text(console: Console, line: str) -> Text:
    # As `Text`, rich reads no markup in it: a layer may be called "[red]".
    return Text(writable(line, console.encoding))


def _table(report: Report, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in _HEADS:
        justify: Literal["left", "right"] = "right" if head in {"before", "after"} else "left"
        table.add_column(head, justify=justify, style="bold" if head == "change" else "")
    for row in rows(report):
        cells = (row.label, row.before, row.after, row.change)
        table.add_row(*(_text(console, cell) for cell in cells))
    return table


def _sections(report: Report, files: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    if report.degradations:
        body = [
            f"{clean(one.stage)}: {clean(one.what)}" + (f" ({clean(one.why)})" if one.why else "")
            for one in report.degradations
        ]
        yield "degraded", body
    if report.warnings:
        yield "warnings", [clean(warning) for warning in report.warnings]
    if report.sample is not None:
        yield "it goes on from a text of the test part", list(sample_lines(report.sample))
    if report.limit is not None:
        yield "at most this loss", list(limit_lines(report.limit))
    if report.model_sparsity is not None:
        yield "sparsity", list(sparsity_lines(report))
    notes = () if report.certificate is None else report.certificate.notes
    yield "proof", [proof_line(report), *map(clean, notes)]  # also where there is none: silence would read as proved
    if report.conditions:
        yield "the proof holds under conditions", [clean(line) for line in grouped(report.conditions)]
    if report.locked:
        total = sum(one.params for one in report.locked)
        # The largest first, since these decide how much could be gained by freeing them.
        largest = sorted(report.locked, key=lambda one: (-one.params, one.name))
        body = [_locked_line(one) for one in largest[:MOST_LOCKED]]
        if len(largest) > MOST_LOCKED:
            body.append(f"and {len(largest) - MOST_LOCKED} more, see the report")
        yield f"locked, not cut ({'; '.join(filter(None, (f'{count(total)} parameters', aside(report.locked))))})", body
    if report.seconds:
        yield (
            "time",
            [", ".join(f"{clean(stage)} {seconds(value)}" for stage, value in report.seconds.items())],
        )
    if files:
        yield "files", [f"{clean(what)}: {clean(where)}" for what, where in files.items()]


def sample_lines(sample: Sample) -> Iterator[str]:
    """Lines of what a language model wrote.

    Args:
        sample: prompt and both continuations.
    """
    for name, text in (("text", sample.prompt), ("before", sample.before), ("after", sample.after)):
        yield f"{name}: {clean(' '.join(text.split()), limit=400)}"


def sparsity_lines(report: Report) -> Iterator[str]:
    """Say what part of the asked units and of all weights is gone, and which weights were never among them.

    Args:
        report: the record of a run.
    """
    if report.model_sparsity is not None:
        gone = "zero" if report.applied == "mask" else "gone or zero"
        asked = f"{percent(report.sparsity)} of the {clean(report.units.what)}"
        yield f"{asked} that were asked, {percent(report.model_sparsity)} of all weights of the model are {gone}"
    for one in sorted(report.left_out, key=lambda one: (-one.params, one.name))[:MOST_LOCKED]:
        line = f"left out: {clean(one.name, limit=60)} ({count(one.params)} weights): {clean(one.why)}"
        yield line + (f"; {clean(one.hint)}" if one.hint else "")
    if len(report.left_out) > MOST_LOCKED:
        yield f"and {len(report.left_out) - MOST_LOCKED} more are left out, see the report"


def proof_line(report: Report) -> str:
    """Say whether the cut was proved, and how closely.

    Args:
        report: the record of a run.

    Returns:
        One sentence without a final stop.
    """
    proof = report.certificate
    if proof is None:
        return f"no certificate: {clean(report.certificate_reason)}"
    return (
        f"the cut gives what the original gives without these parts: largest error "
        f"{significant(proof.max_abs_error, 2)}, tolerance {significant(proof.tolerance, 2)} ({clean(proof.dtype)}, "
        f"{clean(proof.method)}{_tried(proof)}; proof: {clean(proof.effort)})"
    )


def _tried(proof: Certificate) -> str:
    if not proof.trials:
        return ", the example only"
    methods = ", ".join(dict.fromkeys(clean(trial.method) for trial in proof.trials))
    return f"; {methods} on {len(proof.trials)} inputs"


def _locked_line(one: Locked) -> str:
    places = [clean(place) for place in (one.op, one.module, one.where) if place]
    line = f"{clean(one.name, limit=60)}: {clean(one.reason)}"
    line += f" [{', '.join(places)}]" if places else ""
    return line + (f"; {clean(one.hint)}" if one.hint else "")
