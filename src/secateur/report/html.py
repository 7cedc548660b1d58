"""The report as one HTML file that opens offline and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from secateur.errors import RecipeError
from secateur.planning.explain import evidence
from secateur.report.charts import figures
from secateur.report.limit import limit_lines
from secateur.report.record import Report
from secateur.report.safe_text import clean, count, percent, seconds, significant
from secateur.report.terminal import proof_line
from secateur.report.verdict import rows, score, verdict

_HERE = Path(__file__).parent  # templates are read from the package, never looked up by a name from outside
_SCRIPT, _END = "<script>", "</script>"


def render_html(report: Report, *, charts: bool = True) -> str:
    """Render a report as one self-contained HTML page.

    The page holds plotly.js once (about 4.8 MB, which is why a report is not small) and no reference to
    anything outside itself. Its content security policy forbids the network and every script but the two that
    are named by hash, so a name that slipped through the escaping could still not run. All names are escaped
    for the place where they stand: HTML, JSON in a script block, and plotly's own small markup.

    Args:
        report: the record of a run; every string in it is untrusted.
        charts: False leaves plotly.js and the charts out (a page of some tens of kB; the tables hold the same
            numbers, but the histograms are only in the charts and in report.json).

    Returns:
        The text of the page; write it as UTF-8.

    Cost:
        Two hashes and one copy of plotly.js; the charts grow with the number of layers.
    """
    scripts = [plotly_script(), page_script(_HERE / "charts.html")] if charts else []
    environment = environment_of_pages()
    return environment.get_template("report.html").render(
        report=report,
        verdict=verdict(report),
        rows=rows(report),
        proof=proof_line(report),
        evidence=[] if report.certificate is None else evidence(report.certificate),
        score=score,
        limit=[] if report.limit is None else list(limit_lines(report.limit)),
        recipe=json.dumps(report.recipe, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False),
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),  # noqa: S704
        policy=policy_for(scripts),
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        data=json_block(figures(report)) if charts else None,
    )


def environment_of_pages() -> Environment:
    """Where templates come from, and what they may do to a text."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        # A misspelt name in a template would otherwise render as nothing, which in a report reads as "none".
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "clean": clean,
        # Commands and recipes keep their line feeds, names do not.
        "lines": lambda text: clean(text, lines=True),
        "arrows": lambda text: text.replace(" -> ", " → "),
        "count": count,
        "percent": percent,
        "seconds": seconds,
        "significant": significant,
    }
    environment.filters.update(filters)
    return environment


def render_structure_html(view: Mapping[str, Any]) -> str:
    """Render what `inspect` found as one self-contained page: the tree of groups, and what is locked and why.

    Args:
        view: `View.to_dict()`; every string in it is untrusted.

    Returns:
        The text of the page, without any script; write it as UTF-8.
    """
    return (
        environment_of_pages()
        .get_template("structure.html")
        .render(
            view=view,
            tree=_tree(view["groups"]),
            locked=sorted(view["locked"], key=lambda group: -group["params"]),
            style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),  # noqa: S704
            policy=policy_for([]),
        )
    )


@dataclass
class Prefix:
    """What lies under one prefix of names.

    Args:
        groups: those whose name ends here.
        children: next part of the name -> what lies under it.
        params: of everything under it.
    """

    groups: list[Mapping[str, object]] = field(default_factory=list)
    children: dict[str, Prefix] = field(default_factory=dict)
    params: int = 0


def _tree(groups: Sequence[Mapping[str, Any]]) -> Prefix:
    root = Prefix()
    for group in groups:
        node = root
        # The last part names the group itself, which is a leaf and no branch.
        for part in group["name"].split(".")[:-1]:
            node.params += group["params"]
            node = node.children.setdefault(part, Prefix())
        node.params += group["params"]
        node.groups.append(group)
    return root


def json_block(data: object) -> Markup:
    """Write JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    # HTML ends a script element at "</script", whatever JSON string it stands in.
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)  # noqa: S704


def policy_for(scripts: list[str]) -> str:
    """Content security policy that allows the given scripts by hash and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def plotly_script() -> str:
    """plotly.js as the text of a script element."""
    from plotly.offline import get_plotlyjs

    # Browsers hash a script after they made all line ends "\n", so the policy's hash must be of that text.
    script = str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in script.lower() or "<!--" in script:
        raise RecipeError(
            "the installed plotly.js cannot be written into a page",
            why="it holds text that would end the script element",
            hint="render with charts=False, or install another plotly release",
        )
    return script


def page_script(page: Path) -> str:
    """The script of a page that ships with the package: there, editors and linters see it as what it is."""
    text = page.read_text(encoding="utf-8")
    return text[text.index(_SCRIPT) + len(_SCRIPT) : text.rindex(_END)]
