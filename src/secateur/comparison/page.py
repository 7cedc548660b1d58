"""The page of a comparison: verdicts, curves that open offline, tables, protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from secateur.comparison.cells import SCRATCH
from secateur.comparison.markdown import FIDELITY, number, signed, words
from secateur.comparison.records import CurvePoint, LayerShares, Manifest, ScoringLine, Summary
from secateur.files.seeds import canonical_json
from secateur.report.html import json_block, page_script, plotly_script, policy_for
from secateur.report.safe_text import clean, count, for_plotly, percent, seconds, significant, size
from secateur.types import Json

_HERE = Path(__file__).parent
_STYLE = _HERE.parent / "report" / "report.css"
COLOURS = ("#3f86cc", "#d98324", "#2e9e6b", "#a855b5", "#c0453b", "#7a6a58", "#d16ba5", "#6d8f1f", "#1c9aa8", "#8a6fd1")
DASHES = ("solid", "dash", "longdashdot")
LABEL = 40  # characters of a name that fit beside a curve

Figure = dict[str, Json]  # of plotly, as plain data


def to_html(summary: Summary, manifest: Manifest, *, charts: bool = True) -> str:
    """The page: verdict, curves, tables, protocol. Self-contained; every name in it is escaped.

    Args:
        summary: from `summarise`.
        manifest: of the comparison.
        charts: False leaves plotly.js and the curves out.
    """
    scripts = [plotly_script(), page_script(_HERE / "charts.html")] if charts else []
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
        # Style and scripts are files of this package, and the only text that is not escaped.
        style=Markup(_STYLE.read_text(encoding="utf-8")),  # noqa: S704
        policy=policy_for(scripts),
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        data=json_block(comparison_figures(summary, manifest)) if charts else None,
        recoveries=list(summary["curves"]),
        fidelity=FIDELITY.format(probes=manifest["protocol"]["probes"]),
    )


def comparison_figures(summary: Summary, manifest: Manifest) -> dict[str, Figure]:
    """Plotly figures as plain data: one of curves per recovery, of layers, of scoring costs."""
    controls = {one["label"] for one in manifest["criteria"] if one["control"]} | {SCRATCH}
    # One look per criterion on the whole page, whichever of them have curves in a recovery.
    labels = dict.fromkeys(label for curves in summary["curves"].values() for label in curves)
    looks = {label: _look(place, control=label in controls) for place, label in enumerate(labels)}
    axis = f"fraction of the {manifest['protocol']['match']} removed"
    # Numbered: a recovery's name may hold what no attribute may.
    found = {
        f"curves-{place}": _curves(curves, looks, summary["dense"][recovery]["mean"], axis, summary["metric"])
        for place, (recovery, curves) in enumerate(summary["curves"].items())
    }
    return {**found, "layers": _layers(summary["layers"]), "scoring": _scoring(summary["scoring"])}


def _look(place: int, *, control: bool) -> tuple[str, str]:
    """(colour, dash) of a criterion; beyond ten the colours come again, with other dashes."""
    dash = "dot" if control else DASHES[place // len(COLOURS) % len(DASHES)]
    return COLOURS[place % len(COLOURS)], dash


def _curves(
    curves: Mapping[str, Sequence[CurvePoint]],
    looks: Mapping[str, tuple[str, str]],
    dense: float | None,
    axis: str,
    metric: str,
) -> Figure:
    shapes: list[Json] = []
    if dense is not None:
        line: Json = {"color": "#9aa1ab", "dash": "dash", "width": 1}
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": dense, "y1": dense, "line": line})
    levels = [point["level"] for points in curves.values() for point in points] or [0.5]
    # A margin of its own: plotly's would run past 1, where nothing is left to remove.
    span: Json = [max(0.0, min(levels) - 0.05), min(1.0, max(levels) + 0.05)]
    return {
        "data": [_curve(label, points, *looks[label]) for label, points in curves.items()],
        "layout": _layout(480, x={**_titled(axis), "range": span}, y=_titled(metric), shapes=shapes),
    }


def _curve(label: str, points: Sequence[CurvePoint], colour: str, dash: str) -> Figure:
    shown = [
        f"{for_plotly(label)}<br>removed {point['level']:g}<br>{number(point['mean'])}"
        f" (sd {number(point['sd'])}, {point['seeds']} seeds)"
        for point in points
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": for_plotly(label, limit=LABEL),
        "x": [point["level"] for point in points],
        "y": [point["mean"] for point in points],
        "error_y": {
            "type": "data",
            "array": [point["sd"] for point in points],
            "color": colour,
            "thickness": 1,
            "width": 3,
        },
        "line": {"color": colour, "width": 2, "dash": dash},
        "customdata": shown,
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _layers(layers: LayerShares) -> Figure:
    # From below to above in plotly, from above to below for readers.
    labels = [for_plotly(label, limit=LABEL) for label in reversed(layers["kept"])]
    shares: Figure = {
        "type": "heatmap",
        "x": [for_plotly(name, limit=LABEL) for name in layers["groups"]],
        "y": labels,
        "z": list(reversed(layers["kept"].values())),
        # Fixed, so that a page of even layers does not look as torn as one of emptied ones.
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "#7a1f1f"], [0.5, "#e9d8a6"], [1, "#3f86cc"]],
        "colorbar": {"thickness": 12, "tickformat": ".0%"},
        "hovertemplate": "%{y}<br>%{x}<br>keeps %{z:.1%}<extra></extra>",
    }
    names: Figure = {"automargin": True, "type": "category"}
    height = 190 + 22 * len(labels)
    return {"data": [shares], "layout": _layout(height, x={**names, "tickangle": -45}, y=names, top=40)}


def _scoring(lines: Sequence[ScoringLine]) -> Figure:
    shown = list(reversed(lines))
    bars: Figure = {
        "type": "bar",
        "orientation": "h",
        "x": [max(line["seconds"], 1e-5) for line in shown],  # the logarithm of a clock's zero is no place
        "y": [for_plotly(line["criterion"], limit=LABEL) for line in shown],
        "marker": {"color": COLOURS[0]},
        "customdata": [f"{for_plotly(line['criterion'])}<br>{seconds(line['seconds'])}" for line in shown],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    axis: Figure = {**_titled("seconds of scoring (log)"), "type": "log"}
    return {"data": [bars], "layout": _layout(90 + 26 * len(shown), x=axis, y={"automargin": True})}


def _titled(text: str) -> Figure:
    return {"title": {"text": for_plotly(text)}, "zeroline": False, "automargin": True}


def _layout(height: int, *, x: Figure, y: Figure, shapes: Sequence[Json] = (), top: int = 20) -> Figure:
    return {
        "height": height,
        "margin": {"l": 8, "r": 16, "t": top, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"align": "left", "bgcolor": "#1b1f24", "font": {"color": "#ffffff"}},
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        "xaxis": x,
        "yaxis": y,
        "shapes": list(shapes),
    }
