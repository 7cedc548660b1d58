"""The charts of the HTML report as plain plotly figures. Every name in them is escaped for plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from secateur.report.record import Histogram, Report, TrainingPoint
from secateur.report.safe_text import clean, count, for_plotly, percent, significant
from secateur.report.verdict import LATENCY_LABEL, rows

# A plotly figure as JSON. Its own schema has thousands of keys, and only plotly.js knows whether they fit.
Figure = dict[str, Any]
BEFORE, AFTER, NEAR = "#9aa1ab", "#3f86cc", "#d98324"
# Hover texts are written here and not by plotly's own templates, which would put names into its markup unescaped.
_HOVER = "%{customdata}<extra></extra>"
_LABEL = 34  # characters of a layer's name beside an axis


class Bins(TypedDict):
    """A histogram for the page's script."""

    edges: list[float]
    counts: list[int]


class Histograms(TypedDict):
    """Both histograms of a layer, and the highest score that was removed."""

    name: str
    weights: Bins | None
    scores: Bins | None
    cut: float | None


class Charts(TypedDict):
    """Everything that the page's script draws."""

    before_after: Figure | None
    layers: Figure | None
    training: Figure | None
    histograms: list[Histograms]


def figures(report: Report) -> Charts:
    """Give everything that the page's script draws, ready to be written as JSON.

    Args:
        report: the record of a run.

    Returns:
        ``before_after``, ``layers`` and ``training`` as plotly figures (None where there is nothing to draw),
        and ``histograms``: per layer the edges and counts, from which the page draws the chosen one.
    """
    return {
        "before_after": before_after(report),
        "layers": layers(report),
        "training": training(report.training),
        "histograms": [
            {
                "name": clean(layer.name),
                "weights": _bins(layer.weight_histogram),
                "scores": _bins(layer.score_histogram),
                "cut": layer.score_cut if layer.removed else None,
            }
            for layer in report.layers
        ],
    }


def before_after(report: Report) -> Figure | None:
    """Draw every figure after the run as a share of its value before.

    Args:
        report: the record of a run.

    Returns:
        A plotly figure with two bars per row, or None where no row has a share.
    """
    # In shares of the value before, so that MACs, bytes and milliseconds fit one axis.
    shown = [row for row in rows(report) if row.share is not None]
    if not shown:
        return None
    ticks = list(range(len(shown)))
    lower, upper = _latency_spread(report, [row.label for row in shown])
    after = _bars(ticks, [100 * (row.share or 0.0) for row in shown], "after", AFTER)
    after["customdata"] = [for_plotly(f"{row.label} after: {row.after} {row.change}") for row in shown]
    after["error_x"] = {
        "type": "data",
        "symmetric": False,
        "array": upper,
        "arrayminus": lower,
        "thickness": 2,
        "width": 0,
    }
    first = _bars(ticks, [100.0] * len(shown), "before", BEFORE)
    first["customdata"] = [for_plotly(f"{row.label} before: {row.before}") for row in shown]
    layout = _layout(70 + 52 * len(shown), "% of the value before")
    layout["yaxis"] |= _rows([row.label for row in shown])
    return {"data": [first, after], "layout": layout | {"barmode": "group", "bargap": 0.35}}


def layers(report: Report) -> Figure | None:
    """Draw the sparsity of every layer, and the share of its weights that were near zero.

    Args:
        report: the record of a run.

    Returns:
        A plotly figure with one row per layer, or None without layers.
    """
    if not report.layers:
        return None
    ticks = list(range(len(report.layers)))
    bars = _bars(ticks, [100 * layer.sparsity for layer in report.layers], "removed", AFTER)
    bars["customdata"] = [
        f"{for_plotly(layer.name)}<br>shape {list(layer.shape)}<br>"
        f"{layer.removed:,} of {layer.total:,} removed ({percent(layer.sparsity)})<br>"
        f"parameters {count(layer.params_before)} -> {count(layer.params_after)}"
        for layer in report.layers
    ]
    near = {
        "type": "scatter",
        "mode": "markers",
        "name": "weights near zero before",
        "x": [100 * layer.near_zero for layer in report.layers],
        "y": ticks,
        "marker": {"color": NEAR, "symbol": "diamond", "size": 8},
        "customdata": [
            f"{for_plotly(layer.name)}<br>{percent(layer.near_zero)} of the weights were near zero"
            for layer in report.layers
        ],
        "hovertemplate": _HOVER,
    }
    layout = _layout(80 + 24 * len(ticks), "% of the layer")
    layout["yaxis"] |= _rows([layer.name for layer in report.layers])
    layout["xaxis"] |= {"range": [0, 102]}  # the whole share, so that two reports can be laid side by side
    return {"data": [bars, near], "layout": layout | {"bargap": 0.3}}


def training(points: Sequence[TrainingPoint]) -> Figure | None:
    """Draw the loss, the learning rate and, where they are known, quality and sparsity over the steps of training.

    Args:
        points: of a report, or of a run that is under way.

    Returns:
        A plotly figure of small multiples, or None without training.
    """
    if not points:
        return None
    curves: list[tuple[str, list[tuple[int, float | None]]]] = [
        ("loss", [(point.step, point.loss) for point in points]),
        ("quality", [(point.step, point.quality) for point in points if point.quality is not None]),
        ("sparsity", [(point.step, point.sparsity) for point in points if point.sparsity is not None]),
        ("learning rate", [(point.step, point.lr) for point in points]),
    ]
    if not any(point.lr for point in points):
        curves.pop()  # a rate of 0 all along is one that nobody has told
    curves = [(name, pairs) for name, pairs in curves if pairs]
    layout = _layout(60 + 150 * len(curves), "step")
    del layout["yaxis"], layout["legend"]
    data = []
    # Plotly stacks from below, and the loss is read first: hence from the last to the first.
    for place, (name, pairs) in enumerate(reversed(curves)):
        axis = "" if place == 0 else str(place + 1)
        low = place / len(curves)
        layout[f"yaxis{axis}"] = {
            "domain": [low + 0.04, low + 1 / len(curves) - 0.04],
            "title": {"text": name},
        }
        layout[f"yaxis{axis}"] |= {"automargin": True, "nticks": 5, "anchor": "x"}
        if len({value for _, value in pairs}) == 1:  # plotly would show one below to one above, where 0.001 is no rate
            layout[f"yaxis{axis}"] |= {"rangemode": "tozero"}
        data.append(_curve(name, pairs, axis))
    layout["showlegend"] = False
    return {"data": data, "layout": layout}


def _curve(name: str, pairs: list[tuple[int, float | None]], axis: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(pairs) <= 60 else "lines",  # more markers would hide the curve
        "name": name,
        "x": [step for step, _ in pairs],
        "y": [value for _, value in pairs],
        "yaxis": f"y{axis}",
        "line": {"color": NEAR if name == "quality" else AFTER, "width": 2},
        "customdata": [
            f"step {step}<br>{name} " + ("not finite" if value is None else significant(value, 4))
            for step, value in pairs
        ],
        "hovertemplate": _HOVER,
    }


def _bars(ticks: list[int], values: list[float], name: str, colour: str) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": values,
        "y": ticks,
        "marker": {"color": colour},
        "hovertemplate": _HOVER,
    }


def _rows(names: list[str]) -> Figure:
    """Give a vertical axis with the first row on top, whatever the number of rows."""
    texts = [for_plotly(name, limit=_LABEL) for name in names]
    return {"range": [len(names) - 0.5, -0.5], "tickvals": list(range(len(names))), "ticktext": texts}


def _layout(height: int, title: str) -> Figure:
    return {
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 34, "b": 44},
        # Transparent: the page sets light and dark itself.
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"align": "left", "bgcolor": "#1b1f24", "font": {"color": "#ffffff"}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8a8f98", "activecolor": "#3f86cc"},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": {"title": {"text": title}, "zeroline": False, "automargin": True},
        "yaxis": {"automargin": True, "zeroline": False, "showgrid": False},
    }


def _latency_spread(report: Report, labels: list[str]) -> tuple[list[float | None], list[float | None]]:
    before, after = report.before.latency_ms, report.after.latency_ms
    low: list[float | None] = [None] * len(labels)
    high = low.copy()
    if before and after and before.median and LATENCY_LABEL in labels:
        place = labels.index(LATENCY_LABEL)
        low[place] = 100 * (after.median - after.p10) / before.median
        high[place] = 100 * (after.p90 - after.median) / before.median
    return low, high


def _bins(found: Histogram | None) -> Bins | None:
    return None if found is None else {"edges": list(found.edges), "counts": list(found.counts)}
