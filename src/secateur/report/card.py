"""The model card of an output folder: what was cut, by what, what it was and is, how it was proved, how to load it."""

from __future__ import annotations

import re

from secateur.report.next_steps import loading
from secateur.report.record import Report
from secateur.report.safe_text import clean, percent
from secateur.report.terminal import proof_line, sample_lines
from secateur.report.verdict import rows, verdict
from secateur.version import __version__

SHOWN = 5  # conditions


def render_card(report: Report, *, kind: str = "", native: bool = False) -> str:
    """README.md of an output folder, as hubs of models show it.

    Args:
        report: the record of the run.
        kind: class of the model where it is one of transformers, else "".
        native: whether ``from_pretrained`` loads the folder.

    Returns:
        Markdown; names from the model are escaped.
    """
    more = len(report.conditions) - SHOWN
    head = ["---", "tags:", "- pruned", "- secateur", *(["library_name: transformers"] if kind else []), "---", ""]
    lines = [
        f"# {_plain(report.title)}, pruned",
        "",
        _plain(str(verdict(report))),
        "",
        "## What was removed",
        "",
        f"- {report.units.removed:,} of {report.units.total:,} {_plain(report.units.what)} "
        f"({percent(report.sparsity)})",
        f"- chosen by `{_code(report.criterion.name)}`{_options(report)}, scope `{_code(report.scope)}`",
        f"- asked for: {_target(report)}",
        f"- {_plain(proof_line(report))}",
        *(f"- condition: {_plain(str(condition))}" for condition in report.conditions[:SHOWN]),
        *([f"- and {more} more conditions, see report.html"] if more > 0 else []),
        "",
        "## Before and after",
        "",
        "| | before | after | change |",
        "|---|---|---|---|",
        *(f"| {_cell(r.label)} | {_cell(r.before)} | {_cell(r.after)} | {_cell(r.change)} |" for r in rows(report)),
        "",
        _quality(report),
        *([] if report.sample is None else ["", *(f"- {_plain(line)}" for line in sample_lines(report.sample))]),
        "",
        "## How to load it",
        "",
        *_loading(kind, native=native),
        "",
        *_notes(report),
        f"Made with secateur {__version__}. `report.html` shows all figures, `recipe.yaml` is what was asked for, and "
        "`plan.json` says unit by unit what went. Nothing in this folder is code.",
        "",
    ]
    return "\n".join([*head, *lines])


def _quality(report: Report) -> str:
    if report.quality_missing:
        return f"Quality was not measured: {_plain(report.quality_missing)}."
    on = f" on {_plain(report.quality_on)}" if report.quality_on else ""
    return f"Quality was measured{on}, before and after, on the same samples."


def _loading(kind: str, *, native: bool) -> list[str]:
    body, said = loading("THIS_FOLDER", kind=_code(kind), native=native)
    return ["```python", *body.splitlines(), "```", *(["", said.replace("YourModel", "`YourModel`")] if said else [])]


def _notes(report: Report) -> list[str]:
    said = [*(f"{one.stage}: {one.what}" for one in report.degradations), *report.warnings]
    return ["## Limits", "", *(f"- {_plain(one)}" for one in said), ""] if said else []


def _target(report: Report) -> str:
    return ", ".join(f"`{_code(name)}` {value:g}" for name, value in report.target.items()) or "exactly these units"


def _options(report: Report) -> str:
    given = ", ".join(f"{name} {value}" for name, value in report.criterion.options.items() if value is not None)
    return f" ({_plain(given)})" if given else ""


def _plain(text: str) -> str:
    """Words of others letter by letter: no link, picture or markup of theirs in a page that is shown."""
    return re.sub(r"([\\`*_\[\]<#|!])", r"\\\1", clean(text))


def _cell(text: str) -> str:
    return _plain(text)


def _code(text: str) -> str:
    return clean(text).replace("`", "'")
