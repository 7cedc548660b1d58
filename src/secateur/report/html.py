"""The report as one HTML file that opens offline and asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment

from secateur.drawing import environment_of_pages, page_parts, picture
from secateur.planning.explain import evidence
from secateur.report.charts import histograms, qualities, sizes, training
from secateur.report.limit import limit_lines
from secateur.report.network import drawn_parts
from secateur.report.next_steps import next_steps
from secateur.report.record import Report
from secateur.report.safe_text import clean, count, percent, seconds, significant
from secateur.report.terminal import proof_line
from secateur.report.verdict import rows, score, verdict

_HERE = Path(__file__).parent
MOST_DRAWN = 120  # layers with histograms; a page of a thousand layers would be read by nobody
FILTERS: dict[str, Callable[..., str]] = {
    "clean": clean,
    # Commands and recipes keep their line feeds, names do not.
    "lines": lambda text: clean(text, lines=True),
    "arrows": lambda text: text.replace(" -> ", " → "),
    "count": count,
    "percent": percent,
    "seconds": seconds,
    "significant": significant,
}


def render_html(report: Report, *, charts: bool = True, folder: str = "", kind: str = "", native: bool = False) -> str:
    """Render a report as one self-contained HTML page.

    It opens with the network before and after. Pictures are SVG made here, so the page holds no library and no
    reference to anything outside itself, and says all it says without its one small script too. Its content security
    policy forbids the network and every other script. All names are escaped.

    Args:
        report: the record of a run; every string in it is untrusted.
        charts: False leaves all pictures out; the tables hold the same numbers, but for the histograms, which are then
            only in report.json.
        folder: where the result lies, for the lines that load and export it; "" leaves them out.
        kind: class of the model where it is one of transformers.
        native: whether ``from_pretrained`` loads the folder.

    Returns:
        The text of the page; write it as UTF-8.

    Cost:
        About 2 kB for each layer, 1 kB for each part of the network.
    """
    layers = report.layers[:MOST_DRAWN] if charts else ()
    return (
        pages()
        .get_template("report.html")
        .render(
            report=report,
            verdict=verdict(report),
            rows=rows(report),
            proof=proof_line(report),
            evidence=[] if report.certificate is None else evidence(report.certificate),
            score=score,
            limit=[] if report.limit is None else list(limit_lines(report.limit)),
            recipe=json.dumps(report.recipe, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False),
            network=picture(drawn_parts(report.network, report.locked)) if charts else None,
            sizes=sizes(report) if charts else None,
            qualities=qualities(report) if charts else [],
            training=training(report.training) if charts else [],
            histograms=[(layer, drawings) for layer in layers if (drawings := histograms(layer))],
            steps=next_steps(report, folder, kind=kind, native=native) if folder else [],
            **page_parts(),
        )
    )


def pages() -> Environment:
    """Where the templates of reports come from, and what they may do to a text."""
    return environment_of_pages(_HERE, FILTERS)
