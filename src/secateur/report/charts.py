"""The charts of a report: sizes, quality against sparsity, curves of training, histograms of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from secateur.drawing import Bar, Curve, bars, curves, histogram
from secateur.drawing.charts import Axes, Level
from secateur.report.intervals import share_interval
from secateur.report.record import Layer, Report, TrainingPoint
from secateur.report.safe_text import clean, percent, significant
from secateur.report.verdict import LATENCY_LABEL, is_share, rows, score
from secateur.types import Latency

MARKED = 60  # points; more of them would hide the curve


def sizes(report: Report) -> Markup | None:
    """Every size and time after the run as a share of its value before; None where no figure has a share.

    Quality is drawn elsewhere: "114 % of the accuracy before" would read as a fault.
    """
    names = {*report.before.quality, *report.after.quality}
    found = [row for row in rows(report) if row.share is not None and row.metric not in names]
    if not found:
        return None
    return bars(
        [
            Bar(
                row.label,
                [100.0, 100 * (row.share or 0.0)],
                [f"{row.label} before: {row.before}", f"{row.label} after: {row.after} {row.change}"],
                _spreads(report) if row.label == LATENCY_LABEL else (),
            )
            for row in found
        ],
        "% of the value before",
        "Bars of every size after the run as a share of its value before; the table above holds the numbers",
        whole=100.0,
    )


def qualities(report: Report) -> list[tuple[str, Markup]]:
    """Quality against sparsity, one chart for each figure: the dense model, each measurement on the way, the result."""
    names = sorted({*report.before.quality} & {*report.after.quality})
    return [(name, _quality(report, name)) for name in names]


def _quality(report: Report, name: str) -> Markup:
    old, new, gone = report.before.quality[name], report.after.quality[name], report.sparsity
    middle = (report.after_cut_quality or {}).get(name)
    shared = is_share(name, old, new, middle)
    samples = report.quality_samples.get(name) if shared else None
    times = 100 if shared else 1
    stops = [("dense", 0.0, old, 5)]
    stops += [("right after the cut", gone, middle, 1)] if middle is not None else []
    stops += [("the result", gone, new, 0)]
    drawn = [
        Curve(
            f"{word}: {score(name, value)}",
            [(100 * at, times * value, _with_interval(f"{word}, {percent(at)} removed", name, value, samples))],
            look,
            [_spread_of(value, samples, times)],
        )
        for word, at, value, look in stops
    ]
    # What was judged while it was pruned; where nothing moved there is no curve against sparsity.
    path = [(p.sparsity, p.quality) for p in report.training if p.sparsity is not None and p.quality is not None]
    if len({at for at, _ in path}) > 1:
        points = [(100 * a, times * q, f"{percent(a)} removed: {score(name, q)}") for a, q in path]
        drawn.append(Curve("while it was pruned", points, 2, marked=len(points) <= MARKED))
    lines = []
    if report.control is not None and name in report.control.quality:
        reached = report.control.quality[name]
        lines.append(Level(times * reached, f"dense control, the same steps: {score(name, reached)}"))
    across = f"% of the {clean(report.units.what)} removed"
    axes = Axes(
        across,
        f"{clean(name)}, %" if shared else clean(name),
        across=[0.0],
        ends=(-4.0, 104.0),
        within=(0, 100) if shared else (-1e308, 1e308),
    )
    label = f"{clean(name)} against sparsity; the table of figures holds the numbers"
    return curves(drawn, axes, label, height=260, lines=lines, legend=True)


def _with_interval(words: str, name: str, value: float, samples: int | None) -> str:
    if not samples:
        return f"{words}: {score(name, value)}"
    low, high = share_interval(value, samples)
    return f"{words}: {score(name, value)} ({percent(low)} to {percent(high)}, 95 % on {samples:,} samples)"


def _spread_of(value: float, samples: int | None, times: float) -> tuple[float, float] | None:
    if not samples:
        return None
    low, high = share_interval(value, samples)
    return times * low, times * high


def _spreads(report: Report) -> list[tuple[float, float] | None]:
    """Both ends of the latency's spread, before and after, in % of the median before."""
    before, after = report.before.latency_ms, report.after.latency_ms
    if before is None or after is None or not before.median:
        return [None, None]
    whole = before.median

    def ends(timing: Latency) -> tuple[float, float]:
        return 100 * timing.p10 / whole, 100 * timing.p90 / whole

    return [ends(before), ends(after)]


def training(points: Sequence[TrainingPoint]) -> list[Markup]:
    """Loss, quality, sparsity and learning rate over the steps, one chart each; none without training.

    Args:
        points: of a report, or of a run that is under way.
    """
    found: list[tuple[str, list[tuple[int, float | None]], int]] = [
        ("loss", [(p.step, p.loss) for p in points], 0),
        ("quality", [(p.step, p.quality) for p in points if p.quality is not None], 1),
        ("sparsity", [(p.step, p.sparsity) for p in points if p.sparsity is not None], 2),
        ("learning rate", [(p.step, p.lr) for p in points], 5),
    ]
    if not any(point.lr for point in points):
        found.pop()  # a rate of 0 all along is one that nobody has told
    return [_over_steps(name, pairs, look) for name, pairs, look in found if pairs]


def _over_steps(name: str, pairs: Sequence[tuple[int, float | None]], look: int) -> Markup:
    said = [
        (float(step), value, f"step {step}: {name} " + ("not finite" if value is None else significant(value, 4)))
        for step, value in pairs
    ]
    curve = Curve(name, said, look, marked=len(said) <= MARKED)
    # A rate that never moves would stand on an axis made of its own rounding.
    flat = [0.0] if len({value for _, value in pairs}) == 1 else []
    return curves(
        [curve], Axes("step", name, up=flat), f"{name} over the steps; the table holds the numbers", height=130
    )


def histograms(layer: Layer) -> list[Markup]:
    """How the weights of a layer were spread before pruning, and its scores."""
    found = []
    if layer.weight_histogram is not None:
        bins = layer.weight_histogram
        label = "Histogram of the weights of the layer before pruning"
        found.append(histogram(bins.edges, bins.counts, "weight before pruning", label, cut=None))
    if layer.score_histogram is not None:
        bins = layer.score_histogram
        cut = layer.score_cut if layer.removed else None
        found.append(
            histogram(bins.edges, bins.counts, "score (higher = keep)", "Histogram of the scores of the layer", cut=cut)
        )
    return found
