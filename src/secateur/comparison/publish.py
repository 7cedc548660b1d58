"""The files of a comparison: a tidy CSV, JSON, Markdown and the page, each whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from secateur.comparison.markdown import markdown
from secateur.comparison.page import to_html
from secateur.comparison.records import Manifest, RunRow, Summary
from secateur.files.atomic import atomic_write
from secateur.files.seeds import canonical_json
from secateur.report.safe_text import clean

# Columns that are always there, whatever the runs found; further figures follow by name.
FIXED = (
    "seed", "criterion", "variant", "control", "level", "recovery", "status", "why", "units_removed", "units_total",
    "sparsity", "least_kept", "emptied", "params", "nonzero", "macs", "certificate", "recovery_seconds",
    "recovery_batches", "recovery_hash", "base", "key",
)  # fmt: skip


def publish(folder: Path, rows: Sequence[RunRow], summary: Summary, manifest: Manifest) -> None:
    """Write results.csv, summary.json, manifest.json, compare.md and compare.html, each whole or not at all."""
    atomic_write(folder / "results.csv", to_csv(rows))
    atomic_write(folder / "summary.json", canonical_json(summary))
    atomic_write(folder / "manifest.json", canonical_json(manifest))
    atomic_write(folder / "compare.md", markdown(summary, manifest))
    atomic_write(folder / "compare.html", to_html(summary, manifest))


def to_csv(rows: Sequence[RunRow]) -> str:
    """One line per run, one column per figure; nothing is aggregated."""
    flat = [_flat(row) for row in rows]
    names = [*FIXED, *sorted({name for row in flat for name in row} - set(FIXED))]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in flat:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return stream.getvalue()


def _flat(row: RunRow) -> dict[str, object]:
    out: dict[str, object] = {}
    for name, value in row.items():
        if name == "kept":
            continue  # as many figures as there are layers: they stay in the cells
        if name == "options":
            out[name] = canonical_json(value).strip()
        elif isinstance(value, Mapping):
            out |= {f"{name}.{key}": item for key, item in value.items()}
        elif value is not None or name in FIXED:
            out[name] = value
    return out


def _cell(value: object) -> object:
    """Text that a spreadsheet would run as a formula is quoted."""
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
