"""The page of a comparison: verdicts, curves that open offline, tables, protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from markupsafe import Markup

from secateur.comparison.cells import SCRATCH
from secateur.comparison.markdown import FIDELITY, number, signed, words
from secateur.comparison.records import CurvePoint, LayerShares, Manifest, ScoringLine, Summary
from secateur.drawing import Bar, Curve, bars, curves, environment_of_pages, heat, page_parts
from secateur.drawing.charts import Axes, Level
from secateur.files.seeds import canonical_json
from secateur.report.safe_text import clean, count, percent, seconds, significant, size

_HERE = Path(__file__).parent
LABEL = 60  # characters of a name that fit above a bar
FILTERS: dict[str, Callable[..., str]] = {
    "clean": clean,
    "count": count,
    "number": number,
    "percent": percent,
    "seconds": seconds,
    "signed": signed,
    "significant": significant,
    "size": size,
}


class Drawings(TypedDict):
    """The pictures of the page: curves by recovery, what is left of the layers, what scoring costs."""

    curves: dict[str, Markup]
    layers: Markup
    scoring: Markup


def to_html(summary: Summary, manifest: Manifest, *, charts: bool = True) -> str:
    """The page: verdict, curves, tables, protocol. Self-contained; every name in it is escaped.

    Args:
        summary: from `summarise`.
        manifest: of the comparison.
        charts: False leaves the pictures out; the tables hold the same numbers.
    """
    return environment_of_pages(_HERE, FILTERS).get_template("page.html").render(
        summary=summary,
        manifest=manifest,
        words=words(summary),
        protocol=canonical_json(manifest),
        drawings=comparison_drawings(summary, manifest) if charts else None,
        recoveries=list(summary["curves"]),
        fidelity=FIDELITY.format(probes=manifest["protocol"]["probes"]),
        **page_parts(),
    )  # fmt: skip


def comparison_drawings(summary: Summary, manifest: Manifest) -> Drawings:
    """The pictures: one of curves per recovery, of layers, of scoring costs."""
    controls = {one["label"] for one in manifest["criteria"] if one["control"]} | {SCRATCH}
    # One look per criterion on the whole page, whichever of them have curves in a recovery.
    labels = dict.fromkeys(label for curves in summary["curves"].values() for label in curves)
    looks = {label: place for place, label in enumerate(labels)}
    axes = Axes(
        f"fraction of the {clean(manifest['protocol']['match'])} removed", clean(summary["metric"]), ends=(0.0, 1.0)
    )
    return {
        "curves": {
            recovery: _curves(found, looks, controls, summary["dense"][recovery]["mean"], axes)
            for recovery, found in summary["curves"].items()
        },
        "layers": _layers(summary["layers"]),
        "scoring": _scoring(summary["scoring"]),
    }


def _curves(
    found: Mapping[str, Sequence[CurvePoint]],
    looks: Mapping[str, int],
    controls: set[str],
    dense: float | None,
    axes: Axes,
) -> Markup:
    levels = {point["level"] for points in found.values() for point in points}
    if len(levels) == 1:
        return _ranked(found, dense, axes.y)
    lines = [] if dense is None else [Level(dense, f"dense {number(dense)}")]
    drawn = [_curve(label, points, looks[label], dotted=label in controls) for label, points in found.items()]
    said = f"{axes.y} of every criterion over the fraction removed; the tables below hold the numbers"
    return curves(drawn, axes, said, height=420, lines=lines, legend=True)


def _ranked(found: Mapping[str, Sequence[CurvePoint]], dense: float | None, metric: str) -> Markup:
    """One strength has no curve: points on one x would hide each other, so each criterion gets a bar."""
    known = [(label, point, point["mean"]) for label, points in found.items() for point in points]
    ranked = sorted((each for each in known if each[2] is not None), key=lambda each: -(each[2] or 0.0))
    rows = [Bar("dense", [dense], [f"dense: {number(dense)}"])] if dense is not None else []
    rows += [
        Bar(clean(label, limit=LABEL), [mean or 0.0], [_said(label, point)], [_spread(point)])
        for label, point, mean in ranked
    ]
    level = next(iter(known))[1]["level"] if known else 0.0
    title = f"{metric} with {level:g} removed"
    return bars(rows, title, f"{title}, one bar for each criterion; the tables below hold the numbers")


def _curve(label: str, points: Sequence[CurvePoint], look: int, *, dotted: bool) -> Curve:
    return Curve(
        clean(label, limit=LABEL),
        [(point["level"], point["mean"], _said(label, point)) for point in points],
        look,
        [_spread(point) for point in points],
        dotted=dotted,
    )


def _said(label: str, point: CurvePoint) -> str:
    spread = f"sd {number(point['sd'])}, {point['seeds']} seeds"
    return f"{clean(label)}, {point['level']:g} removed: {number(point['mean'])} ({spread})"


def _spread(point: CurvePoint) -> tuple[float, float] | None:
    mean, sd = point["mean"], point["sd"]
    return None if mean is None or sd is None else (mean - sd, mean + sd)


def _layers(layers: LayerShares) -> Markup:
    names = [clean(label, limit=LABEL) for label in layers["kept"]]
    columns = [clean(name) for name in layers["groups"]]
    said = "Share of every layer that every criterion keeps; results.csv and the cells hold the numbers"
    return heat(names, columns, list(layers["kept"].values()), said)


def _scoring(lines: Sequence[ScoringLine]) -> Markup:
    rows = [
        Bar(
            clean(line["criterion"], limit=LABEL),
            [max(line["seconds"], 1e-5)],  # the logarithm of a clock's zero is no place
            [f"{clean(line['criterion'])}: {seconds(line['seconds'])}"],
        )
        for line in lines
    ]
    return bars(
        rows, "seconds of scoring (log)", "Seconds of scoring of every criterion; the table holds them", log=True
    )
