"""Charts as SVG: curves, bars, histograms, a table of shades. Every figure of theirs stands in a table of the page too.

Widths are shares of the page and heights are pixels, so nothing is scaled: letters and lines stay as they are on a
telephone and on paper, and colours come from the style sheet, which knows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from secateur.drawing.scale import Axis
from secateur.drawing.svg import Attribute, element, joined, share, stretched
from secateur.shown import written

LOOKS = 10  # colours of the style sheet; more curves than that come again with other dashes
DASHES = (None, "7 4", "12 4 3 4")


@dataclass(frozen=True)
class Curve:
    """A line through points.

    Args:
        name: beside its line in the legend.
        points: (x, y, what is said of it); y None interrupts the line.
        look: number of its colour and dashes.
        spread: (low, high) of each point, None where it is not known; empty draws none.
        dotted: for controls, which are no competitors.
        marked: draw the points; of a hundred they would hide the line.
    """

    name: str
    points: Sequence[tuple[float, float | None, str]]
    look: int = 0
    spread: Sequence[tuple[float, float] | None] = ()
    dotted: bool = False
    marked: bool = True


@dataclass(frozen=True)
class Bar:
    """One row of bars.

    Args:
        name: of the row.
        values: lengths, one bar below the other; the last is drawn in colour, those before it in grey.
        said: of each bar.
        spread: (low, high) of each bar, or None.
        mark: a diamond at this place, or None, with what is said of it.
    """

    name: str
    values: Sequence[float]
    said: Sequence[str]
    spread: Sequence[tuple[float, float] | None] = ()
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Level:
    """A line across a chart, such as the level of the dense model.

    Args:
        at: its value.
        said: of it, in the legend: in the chart the words would lie over what is drawn there.
    """

    at: float
    said: str


@dataclass(frozen=True)
class Axes:
    """What stands along the sides.

    Args:
        x, y: titles.
        across: values of x that must fit.
        up: values of y that must fit.
        log_x: a logarithmic axis below.
        within: ends that y can have.
        ends: ends that x can have.
    """

    x: str
    y: str
    across: Sequence[float] = ()
    up: Sequence[float] = field(default_factory=tuple)
    log_x: bool = False
    within: tuple[float, float] = (-math.inf, math.inf)
    ends: tuple[float, float] = (-math.inf, math.inf)


def curves(
    drawn: Sequence[Curve], axes: Axes, label: str, *, height: int = 300, lines: Sequence[Level] = (),
    legend: bool | None = None,
) -> Markup:  # fmt: skip
    """Curves over one axis.

    Args:
        drawn: at least one with a finite point, or the chart is empty.
        axes: titles and ends.
        label: what a screen reader says of the chart.
        height: in pixels.
        lines: levels across the whole.
        legend: names below; by default where there are several, levels counted.
    """
    points = [point for curve in drawn for point in curve.points]
    x = Axis.over([*(p[0] for p in points), *axes.across], margin=0.04, log=axes.log_x, within=axes.ends)
    highs = [value for curve in drawn for pair in curve.spread if pair for value in pair]
    tall = [*(p[1] for p in points if p[1] is not None), *highs, *(line.at for line in lines), *axes.up]
    y = Axis.over(tall, within=axes.within)
    body = [_grid(x, y, height), *(_level(line, y, height) for line in lines)]
    # Beside each other by three pixels: whiskers at one strength would hide each other.
    body += [_curve(curve, x, y, height, 3 * (n - (len(drawn) - 1) / 2)) for n, curve in enumerate(drawn)]
    svg = element("svg", *body, class_="plot", width="100%", height=height, role="img", aria_label=label)
    shown = len(drawn) + len(lines) > 1 if legend is None else legend
    return element(
        "div",
        element("div", axes.y, class_="axis-y", aria_hidden="true"),
        svg,
        element("div", axes.x, class_="axis-x", aria_hidden="true"),
        _legend(drawn, lines) if shown else Markup(""),
        class_="chart",
    )


def bars(rows: Sequence[Bar], title: str, label: str, *, log: bool = False, whole: float | None = None) -> Markup:
    """Rows of horizontal bars.

    Args:
        rows: from above to below.
        title: of the axis.
        label: what a screen reader says of the chart.
        log: a logarithmic axis, on which bars begin at its low end.
        whole: the axis reaches this far at least.
    """
    most = max((len(row.values) for row in rows), default=1)
    tall = 24 + 10 * most
    height = tall * len(rows)
    lengths = [value for row in rows for value in row.values]
    # One odd round may take ten times as long: its line leaves the chart, or every bar would be a stub.
    far = 1.5 * max(lengths, default=1.0)
    ends = [min(value, far) for row in rows for pair in row.spread if pair for value in pair]
    values = [*lengths, *ends, *([] if whole is None else [whole])]
    scale = Axis.over(values, zero=not log, margin=0.02, log=log)
    body = [_across(scale, height)]
    for number, row in enumerate(rows):
        body += _row(row, scale, number * tall)
    svg = element("svg", *body, class_="plot flat", width="100%", height=height, role="img", aria_label=label)
    return element("div", svg, element("div", title, class_="axis-x", aria_hidden="true"), class_="chart bars")


def histogram(edges: Sequence[float], counts: Sequence[int], title: str, label: str, *, cut: float | None) -> Markup:
    """Counts between edges; logarithmic where one bin holds more than half of everything, which its axis says.

    Args:
        edges: one more than counts.
        counts: of each bin.
        title: of the axis below.
        label: what a screen reader says of the chart.
        cut: a dashed line at this value, or None.
    """
    log, height = max(counts, default=0) > sum(counts) / 2, 150
    x = Axis(edges[0], edges[-1] if edges[-1] > edges[0] else edges[0] + 1)
    tallest = max([*counts, 1])
    y = Axis(0.5, tallest * 1.3, log=True) if log else Axis(0, tallest * 1.05)
    steps = ["M0 1000"]
    for left, right, number in zip(edges, edges[1:], counts, strict=False):
        top = 1000 * (1 - (y.place(number) if number else 0))
        steps.append(f"L{1000 * x.place(left):.4g} {top:.4g}L{1000 * x.place(right):.4g} {top:.4g}")
    path = element("path", d="".join([*steps, "L1000 1000Z"]), class_="filled")
    marks = [] if cut is None else [_post(x.place(cut), height, "cut")]
    body = [_grid(x, y, height, across=4, up=3), stretched(height, path), *marks]
    svg = element("svg", *body, class_="plot", width="100%", height=height, role="img", aria_label=label)
    return element(
        "div",
        element("div", "count (log)" if log else "count", class_="axis-y", aria_hidden="true"),
        svg,
        element("div", title, class_="axis-x", aria_hidden="true"),
        class_="chart",
    )


def heat(names: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], label: str) -> Markup:
    """Shares as shades, one row for each name: full where all stays, empty where all goes.

    Args:
        names: of the rows.
        columns: of what stands in a row, said of each cell.
        values: shares in [0, 1].
        label: what a screen reader says of the chart.
    """
    body, wide = [], 1 / max(len(columns), 1)
    for number, (name, row) in enumerate(zip(names, values, strict=True)):
        top = number * 40
        body.append(element("text", name, x=0, y=top + 13, class_="name"))
        for place, (column, value) in enumerate(zip(columns, row, strict=True)):
            tip = f"{name}, {column}: {100 * value:.1f} % stay"
            kept = {"x": share(place * wide), "width": share(max(wide - 0.006, 0.7 * wide))}
            # The filled height says it, and not the colour alone: shades differ from screen to screen, heights do not.
            body.append(element("rect", y=top + 18, height=18, class_="before", data_tip=tip, **kept))
            full = 18 * min(max(value, 0.0), 1.0)
            body.append(element("rect", y=top + 36 - full, height=full, class_="after", data_tip=tip, **kept))
    svg = element("svg", *body, class_="plot flat", width="100%", height=40 * len(names), role="img", aria_label=label)
    return element("div", svg, class_="chart bars")


def _look(number: int) -> tuple[int, str | None]:
    """(colour, dashes) of the curve of this number."""
    return number % LOOKS, DASHES[number // LOOKS % len(DASHES)]


def _grid(x: Axis, y: Axis, height: float, *, across: int = 6, up: int = 6) -> Markup:
    found = [_across(x, height, most=across)]
    for value in y.ticks(up):
        top = height * (1 - y.place(value))
        found.append(element("line", x1=0, x2="100%", y1=top, y2=top, class_="grid"))
        found.append(element("text", _tick(value), x=-6, y=top + 4, class_="tick end"))
    return joined(found)


def _across(x: Axis, height: float, *, most: int = 6) -> Markup:
    found = []
    for value in x.ticks(most):
        place = share(x.place(value))
        found.append(element("line", x1=place, x2=place, y1=0, y2=height, class_="grid"))
        found.append(element("text", _tick(value), x=place, y=height + 16, class_="tick middle"))
    return joined(found)


def _tick(value: float) -> str:
    # The margin holds eight characters.
    return written(value) if abs(value) < 1e6 else f"{value:.3g}"


def _level(line: Level, y: Axis, height: float) -> Markup:
    top = height * (1 - y.place(line.at))
    return element("line", x1=0, x2="100%", y1=top, y2=top, class_="level")


def _post(place: float, height: float, kind: str) -> Markup:
    return element("line", x1=share(place), x2=share(place), y1=0, y2=height, class_=kind)


def _curve(curve: Curve, x: Axis, y: Axis, height: float, aside: float) -> Markup:
    colour, dashes = _look(curve.look)
    kind = f"curve c{colour}"
    steps, drawing = [], False
    for across, up, _ in curve.points:
        if up is None:
            drawing = False
            continue
        steps.append(f"{'L' if drawing else 'M'}{1000 * x.place(across):.5g} {1000 * (1 - y.place(up)):.5g}")
        drawing = True
    dash = "2 4" if curve.dotted else dashes
    found = [stretched(height, element("path", d="".join(steps), class_=kind, stroke_dasharray=dash))]
    for point, pair in zip(curve.points, curve.spread or [None] * len(curve.points), strict=True):
        if pair is not None:
            top, bottom = (height * (1 - y.place(value)) for value in (pair[1], pair[0]))
            place = share(x.place(point[0]))
            moved = f"translate({aside:g} 0)" if aside else None
            whisker: dict[str, Attribute] = {"x1": place, "x2": place, "y1": top, "y2": bottom}
            found.append(element("line", class_=f"whisker c{colour}", transform=moved, **whisker))
    for across, up, said in curve.points:
        if up is not None and (curve.marked or len(curve.points) == 1):
            # A point alone stands where its whisker does; one of several stays on its line.
            moved = f"translate({aside:g} 0)" if aside and len(curve.points) == 1 else None
            dot: dict[str, Attribute] = {"cx": share(x.place(across)), "cy": height * (1 - y.place(up))}
            found.append(element("circle", r=4, class_=f"dot c{colour}", data_tip=said, transform=moved, **dot))
    return joined(found)


def _legend(drawn: Sequence[Curve], lines: Sequence[Level]) -> Markup:
    samples: list[tuple[str, str, str | None]] = []
    for curve in drawn:
        colour, dashes = _look(curve.look)
        samples.append((curve.name, f"curve c{colour}", "2 4" if curve.dotted else dashes))
    samples += [(line.said, "level", None) for line in lines]
    rows = []
    for name, kind, dash in samples:
        line = element("line", x1=0, x2=26, y1=6, y2=6, class_=kind, stroke_dasharray=dash)
        rows.append(element("li", element("svg", line, width=26, height=12, aria_hidden="true"), " ", name))
    return element("ul", *rows, class_="legend")


def _row(row: Bar, scale: Axis, top: float) -> list[Markup]:
    found = [element("text", row.name, x=0, y=top + 13, class_="name")]
    for number, (value, said) in enumerate(zip(row.values, row.said, strict=True)):
        kind = "after" if number == len(row.values) - 1 else "before"
        at = top + 18 + 10 * number
        length = share(max(scale.place(value), 0.002))
        found.append(element("rect", x=0, y=at, width=length, height=8, class_=kind, data_tip=said))
        pair = row.spread[number] if row.spread else None
        if pair is not None:
            ends = {"x1": share(scale.place(pair[0])), "x2": share(min(scale.place(pair[1]), 1.0))}
            found.append(element("line", y1=at + 4, y2=at + 4, class_="whisker", **ends))
    if row.mark is not None:
        at = top + 18 + 5 * len(row.values)
        found.append(
            element("circle", cx=share(scale.place(row.mark[0])), cy=at, r=4, class_="mark", data_tip=row.mark[1])
        )
    return found
