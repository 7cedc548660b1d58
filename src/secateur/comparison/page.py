"""The files of a comparison: a tidy CSV, JSON, a page with curves that opens offline, and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from secateur.comparison.markdown import FIDELITY, markdown, number, signed, words
from secateur.files.atomic import atomic_write
from secateur.files.seeds import canonical_json
from secateur.report.html import json_block, plotly_script, policy_for
from secateur.report.text import clean, count, for_plotly, percent, seconds, significant, size

_HERE = Path(__file__).parent
_STYLE = _HERE.parent / "report" / "report.css"
_SCRIPT, _END = "<script>", "</script>"
COLOURS = ("#3f86cc", "#d98324", "#2e9e6b", "#a855b5", "#c0453b", "#7a6a58", "#d16ba5", "#6d8f1f", "#1c9aa8", "#8a6fd1")
DASHES = ("solid", "dash", "longdashdot")
FIXED = (
    "seed", "criterion", "variant", "control", "level", "recovery", "status", "why", "units_removed", "units_total",
    "sparsity", "least_kept", "emptied", "params", "nonzero", "macs", "certificate", "recovery_seconds",
    "recovery_batches", "recovery_hash", "base", "key",
)  # fmt: skip
Row = Mapping[str, Any]


def publish(folder: Path, rows: Sequence[Row], summary: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Write results.csv, summary.json, manifest.json, compare.md and compare.html, each whole or not at all."""
    atomic_write(folder / "results.csv", to_csv(rows))
    atomic_write(folder / "summary.json", canonical_json(summary))
    atomic_write(folder / "manifest.json", canonical_json(manifest))
    atomic_write(folder / "compare.md", markdown(summary, manifest))
    atomic_write(folder / "compare.html", to_html(summary, manifest))


def to_csv(rows: Sequence[Row]) -> str:
    """One line per run, one column per figure; nothing is aggregated."""
    flat = [_flat(row) for row in rows]
    names = [*FIXED, *sorted({name for row in flat for name in row} - set(FIXED))]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in flat:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return stream.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        if name == "kept":
            continue
        if name == "options":
            out[name] = canonical_json(value).strip()
        elif isinstance(value, Mapping):
            out |= {f"{name}.{key}": item for key, item in value.items()}
        elif value is not None or name in FIXED:
            out[name] = value
    return out


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula is quoted."""
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def to_html(summary: Mapping[str, Any], manifest: Mapping[str, Any], *, charts: bool = True) -> str:
    """The page: verdict, curves, tables, protocol. Self-contained; every name in it is escaped.

    Args:
        summary: from `summarise`.
        manifest: of the comparison.
        charts: False leaves plotly.js and the curves out.
    """
    scripts = [plotly_script(), _page_script()] if charts else []
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., str]] = {
        "clean": clean,
        "count": count,
        "number": number,
        "percent": percent,
        "seconds": seconds,
        "signed": signed,
        "significant": significant,
        "size": size,
    }
    environment.filters.update(filters)
    return environment.get_template("page.html").render(
        summary=summary,
        manifest=manifest,
        words=words(summary),
        protocol=canonical_json(manifest),
        style=Markup(_STYLE.read_text(encoding="utf-8")),  # noqa: S704
        policy=policy_for(scripts),
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        data=json_block(comparison_figures(summary, manifest)) if charts else None,
        recoveries=list(summary["curves"]),
        fidelity=FIDELITY.format(probes=manifest["protocol"]["probes"]),
    )


def comparison_figures(summary: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Plotly figures as plain data: one of curves per recovery, of layers, of scoring costs."""
    controls = {entry["label"] for entry in manifest["criteria"] if entry["control"]} | {"scratch"}
    labels = list(dict.fromkeys(label for curves in summary["curves"].values() for label in curves))
    colours = {label: COLOURS[place % len(COLOURS)] for place, label in enumerate(labels)}
    found = {
        f"curves-{place}": _curves(curves, summary, recovery, controls, colours, manifest)
        for place, (recovery, curves) in enumerate(summary["curves"].items())
    }
    return {**found, "layers": _layers(summary), "scoring": _scoring(summary)}


def _curves(
    curves: Mapping[str, Sequence[Row]],
    summary: Mapping[str, Any],
    recovery: str,
    controls: set[str],
    colours: Mapping[str, str],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    # Beyond ten criteria the colours come again, with other dashes.
    dashes = {label: DASHES[place // len(COLOURS) % len(DASHES)] for place, label in enumerate(colours)}
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": for_plotly(label, limit=40),
            "x": [point["level"] for point in points],
            "y": [point["mean"] for point in points],
            "error_y": {
                "type": "data",
                "array": [point["sd"] for point in points],
                "color": colours[label],
                "thickness": 1,
                "width": 3,
            },
            "line": {"color": colours[label], "width": 2, "dash": "dot" if label in controls else dashes[label]},
            "customdata": [
                f"{for_plotly(label)}<br>removed {point['level']:g}<br>{number(point['mean'])}"
                f" (sd {number(point['sd'])}, {point['seeds']} seeds)"
                for point in points
            ],
            "hovertemplate": "%{customdata}<extra></extra>",
        }
        for label, points in curves.items()
    ]
    dense = summary["dense"][recovery]["mean"]
    shapes = []
    if dense is not None:
        line = {"color": "#9aa1ab", "dash": "dash", "width": 1}
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": dense, "y1": dense, "line": line})
    matched = manifest["protocol"]["match"]
    layout = _layout(f"fraction of the {matched} removed", summary["metric"], shapes)
    levels = [point["level"] for points in curves.values() for point in points] or [0.5]
    layout["xaxis"]["range"] = [max(0.0, min(levels) - 0.05), min(1.0, max(levels) + 0.05)]
    return {"data": data, "layout": layout}


def _layers(summary: Mapping[str, Any]) -> dict[str, Any]:
    layers = summary["layers"]
    labels = [for_plotly(label, limit=40) for label in reversed(layers["kept"])]
    groups = [for_plotly(name, limit=40) for name in layers["groups"]]
    layout = _layout("", "", [])
    layout["yaxis"] = {"automargin": True, "type": "category"}
    layout["xaxis"] = {"automargin": True, "type": "category", "tickangle": -45}
    layout["height"] = 190 + 22 * len(labels)
    layout["margin"]["t"] = 40
    shares = {
        "type": "heatmap",
        "x": groups,
        "y": labels,
        "z": list(reversed(layers["kept"].values())),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "#7a1f1f"], [0.5, "#e9d8a6"], [1, "#3f86cc"]],
        "colorbar": {"thickness": 12, "tickformat": ".0%"},
        "hovertemplate": "%{y}<br>%{x}<br>keeps %{z:.1%}<extra></extra>",
    }
    return {"data": [shares], "layout": layout}


def _scoring(summary: Mapping[str, Any]) -> dict[str, Any]:
    lines = list(reversed(summary["scoring"]))
    layout = _layout("seconds of scoring (log)", "", [])
    layout["xaxis"]["type"] = "log"
    layout["yaxis"] = {"automargin": True}
    layout["height"] = 90 + 26 * len(lines)
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [max(line["seconds"], 1e-5) for line in lines],
        "y": [for_plotly(line["criterion"], limit=40) for line in lines],
        "marker": {"color": COLOURS[0]},
        "customdata": [f"{for_plotly(line['criterion'])}<br>{seconds(line['seconds'])}" for line in lines],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    return {"data": [bars], "layout": layout}


def _layout(x: str, y: str, shapes: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "height": 480,
        "margin": {"l": 8, "r": 16, "t": 20, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"align": "left", "bgcolor": "#1b1f24", "font": {"color": "#ffffff"}},
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        "xaxis": {"title": {"text": for_plotly(x)}, "zeroline": False, "automargin": True},
        "yaxis": {"title": {"text": for_plotly(y)}, "zeroline": False, "automargin": True},
        "shapes": shapes,
    }


def _page_script() -> str:
    text = (_HERE / "charts.html").read_text(encoding="utf-8")
    return text[text.index(_SCRIPT) + len(_SCRIPT) : text.rindex(_END)]
