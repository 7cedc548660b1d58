"""A comparison in words and tables: for a terminal, a pull request or a documentation page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.comparison.records import AgainstReference, BoardLine, CurveMean, HeldFixed, Manifest, Summary
from secateur.comparison.recoveries import NO_RECOVERY
from secateur.comparison.summary import BETTER, SAME, UNTESTED, WORSE
from secateur.report.safe_text import clean, seconds, significant, size


def number(value: float | None) -> str:
    """A quality with four significant digits; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else significant(value, 4)


def signed(value: float | None) -> str:
    """A difference with its sign, three significant digits; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{'+' if value >= 0 else '-'}{significant(abs(value), 3)}"


def words(summary: Summary) -> list[str]:
    """The findings as sentences, cautions first."""
    seeds = len(summary["seeds"])
    lines = []
    # Cautions first: whoever reads one line only should read the one that takes the others back.
    if seeds == 1:
        lines.append("One seed: nothing is tested, and no order of the criteria should be read from this.")
    elif summary["bases"] == 1:
        lines.append("All seeds share one base model: the spread is that of scoring and recovery alone.")
    elif seeds == 2:
        lines.append("Two seeds: an interval is 9 standard deviations wide; hardly anything can be told apart.")
    if summary["pairing"]["broken"]:
        lines.append("NOT PAIRED: recoveries saw different batches in " + "; ".join(summary["pairing"]["broken"]))
    for recovery in summary["curves"]:
        lines += _verdicts(summary, recovery)
    # Of two criteria there is one pair, whose tau is 1 or -1 whatever they are worth.
    taus = [
        entry["tau"]
        for entries in summary["rank_agreement"].values()
        for entry in entries
        if entry["tau"] is not None and entry["criteria"] > 2
    ]
    if taus:
        lines.append(
            f"Rankings at two strengths agree with Kendall's tau of {min(taus):.2f} to {max(taus):.2f}"
            + ("; a winner at one strength need not be one at another." if min(taus) < 0.7 else ".")
        )
    return lines


def _verdicts(summary: Summary, recovery: str) -> list[str]:
    """One sentence: who differs from magnitude over the whole curve, or at the one level that there is."""
    lines: Sequence[CurveMean] = summary["curve_means"][recovery]
    where = "over the whole curve"
    if not lines:
        # Curves of one level have no mean; that level speaks for itself.
        board = next((board for board in summary["boards"] if board["recovery"] == recovery and board["lines"]), None)
        if board is None:
            return []
        lines, where = board["lines"], f"with {board['level']:g} removed"
    by: dict[str, list[str]] = {}
    for line in lines:
        by.setdefault(line["verdict"], []).append(clean(line["criterion"]))
    when = "Without recovery" if recovery == NO_RECOVERY else f"With recovery '{clean(recovery)}'"
    parts = [f"{verdict}: {', '.join(by[verdict])}" for verdict in (BETTER, SAME, WORSE, UNTESTED) if verdict in by]
    return [f"{when}, {where} and against magnitude: {'; '.join(parts)}."] if parts else []


def markdown(summary: Summary, manifest: Manifest) -> str:
    """The whole comparison as Markdown."""
    protocol = manifest["protocol"]
    parts = [
        f"# {_text(manifest['title'])}: criteria compared",
        *(f"- {_text(line)}" for line in words(summary)),
    ]
    for recovery in summary["curves"]:
        parts += ["", f"## {'Without recovery' if recovery == NO_RECOVERY else f'Recovery: {_text(recovery)}'}", ""]
        parts += [_curve_table(summary, recovery, protocol), "", _mean_table(summary, recovery)]
    if summary["ablations"]:
        parts += ["", "## Does the order within a layer matter?", "", _ablation_table(summary)]
    if summary["fidelity"]:
        parts += ["", "## Does the score tell what the loss will do?", "", _fidelity_table(summary, protocol)]
    parts += ["", "## What scoring costs", "", _scoring_table(summary)]
    if summary["refused"]:
        parts += ["", "## Not compared", ""]
        parts += [
            f"- {_text(r['criterion'])}, {r['status']}, {r['runs']} runs: {_text(r['why'])}" for r in summary["refused"]
        ]
    return "\n".join([*parts, "", *_footer(manifest)]) + "\n"


def _curve_table(summary: Summary, recovery: str, protocol: HeldFixed) -> str:
    boards = [board for board in summary["boards"] if board["recovery"] == recovery]
    labels = [line["criterion"] for line in summary["curve_means"][recovery]] or list(summary["curves"][recovery])
    # Criteria with a level missing have no mean over the curve, and still their figures.
    labels += [label for label in summary["curves"][recovery] if label not in labels]
    head = ["criterion", *(f"{board['level']:g}" for board in boards)]
    rows = []
    for label in labels:
        cells = []
        for board in boards:
            line = next((one for one in board["lines"] if one["criterion"] == label), None)
            cells.append("-" if line is None else _quality(line))
        rows.append([_text(label), *cells])
    dense = number(summary["dense"][recovery]["mean"])
    note = (
        f"{_text(summary['metric'])}, mean over seeds and standard deviation, by the fraction of the "
        f"{protocol['match']} removed; dense {dense}. + and -: differs from magnitude (paired t test, Holm); "
        "*: cannot be told from the best."
    )
    return "\n".join([note, "", markdown_table(head, rows)])


def _quality(line: BoardLine) -> str:
    # Marks in the cell, since a Markdown table has no colours.
    sign = {BETTER: " +", WORSE: " -"}.get(line["verdict"], "")
    spread = "" if line["sd"] is None else f" ±{significant(line['sd'], 2)}"
    return f"{number(line['mean'])}{spread}{sign}{' *' if line['leading'] else ''}"


def _mean_table(summary: Summary, recovery: str) -> str:
    rows = [
        [
            _text(line["criterion"]),
            number(line["mean"]),
            signed(line["difference"]),
            _interval(line),
            _p(line["p_holm"]),
            line["verdict"],
        ]
        for line in summary["curve_means"][recovery]
    ]
    if not rows:
        return ""
    head = ["criterion", "mean over the curve", "minus magnitude", "interval", "p (Holm)", "verdict"]
    return markdown_table(head, rows)


def _ablation_table(summary: Summary) -> str:
    rows = [
        [
            _text(line["criterion"]),
            f"{line['level']:g}",
            number(line["as is"]),
            number(line["shuffled"]),
            number(line["inverted"]),
            f"{signed(line['over_shuffled']['difference'])}{_half(line['over_shuffled']['half'])}",
        ]
        for line in summary["ablations"]
    ]
    head = ["criterion", "level", "as is", "shuffled within layers", "inverted within layers", "as is minus shuffled"]
    return markdown_table(head, rows)


FIDELITY = (
    "Some units, at most {probes} per seed, were set to zero one by one (whole layers left out), and the loss on the "
    "scoring samples measured. "
    "Spearman's rank correlation of score and change, over all of these units and within the layers (mean): 1 is the "
    "same order, 0 none. It says nothing of units that stand in for each other, and scores without a sign (|g w|) "
    "cannot tell what lowers the loss from what raises it."
)


def _fidelity_table(summary: Summary, protocol: HeldFixed) -> str:
    rows = [[_text(one["criterion"]), signed(one["all"]), signed(one["within"])] for one in summary["fidelity"]]
    note = FIDELITY.format(probes=protocol["probes"])
    return "\n".join([note, "", markdown_table(["criterion", "over all units", "within layers"], rows)])


def _scoring_table(summary: Summary) -> str:
    # Two significant digits: the third one changes with the weather in the machine.
    rows = [
        [
            _text(line["criterion"]),
            seconds(line["seconds"]),
            "-" if line["epochs"] is None else significant(line["epochs"], 2),
            "-" if line["peak_bytes"] is None else size(int(line["peak_bytes"])),
        ]
        for line in summary["scoring"]
    ]
    note = "One epoch is the work of a forward and backward pass over the scoring data. Memory is what scoring added."
    return "\n".join([note, "", markdown_table(["criterion", "time", "epochs", "peak memory"], rows)])


def _footer(manifest: Manifest) -> list[str]:
    machine, protocol, scoring = manifest["environment"], manifest["protocol"], manifest["scoring"]
    lines = [
        f"{len(protocol['seeds'])} seeds {list(protocol['seeds'])}, {scoring['samples']} scoring samples, granularity "
        f"{_text(str(protocol['granularity']))}, scope {_text(protocol['scope'])}. {manifest['runs']['ok']} of "
        f"{manifest['runs']['total']} runs have a result.",
        f"Machine: {_text(machine['cpu'])}, {machine['threads']} threads, {_text(machine['device'])}, "
        f"torch {_text(machine['torch'])}, secateur {_text(machine['secateur'])}.",
    ]
    return [*lines, *([f"Command: `{_text(manifest['command'])}`"] if manifest["command"] else [])]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _interval(line: AgainstReference) -> str:
    if line["half"] is None or line["difference"] is None:
        return "-"
    return f"{signed(line['difference'] - line['half'])} to {signed(line['difference'] + line['half'])}"


def _half(value: float | None) -> str:
    return "" if value is None else f" ±{significant(value, 2)}"


def _p(value: float | None) -> str:
    return "-" if value is None else ("<0.001" if value < 0.001 else f"{value:.3f}")


def _text(value: str) -> str:
    """Text that can end neither a table cell nor a line, and starts no markup."""
    # Names come from models and folders, and pages of Markdown are shown by others: HTML in them would be run there.
    shown = clean(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{char}" if char in "\\|`[]" else char for char in shown)
