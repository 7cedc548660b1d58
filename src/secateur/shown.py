"""How objects show themselves: one short line, and a small table in a notebook. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape

from secateur.errors import visible

MOST_ROWS = 40  # of a table in a notebook; what is longer is said to be


def line(kind: str, *facts: str) -> str:
    """A short `repr`.

    Example:
        >>> line("Plan", "12 of 48 channels", "certified")
        '<Plan: 12 of 48 channels, certified>'
    """
    return visible(f"<{kind}: {', '.join(fact for fact in facts if fact)}>")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, notes: Sequence[str] = ()) -> str:
    """A table as HTML, letter by letter: names of a model are no markup.

    Args:
        title: a line above.
        head: names of the columns.
        rows: cells; more than `MOST_ROWS` are counted and left out.
        notes: lines below.

    Example:
        >>> table("<b>", ["name"], [["fc1"]])
        '<b>&lt;b&gt;</b><table><tr><th>name</th></tr><tr><td>fc1</td></tr></table>'
    """

    def cells(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_safe(value)}</{tag}>" for value in values) + "</tr>"

    left = len(rows) - MOST_ROWS
    said = [*([f"and {left} more"] if left > 0 else []), *notes]
    body = "".join(cells(row, "td") for row in rows[:MOST_ROWS])
    shown = f"<table>{cells(head, 'th') if head else ''}{body}</table>" if rows else ""
    return f"<b>{_safe(title)}</b>{shown}" + "".join(f"<div>{_safe(note)}</div>" for note in said)


def shortened(text: str, limit: int) -> str:
    """Visible text of at most `limit` characters: the middle is left out, since the end of a layer's name tells most.

    Example:
        >>> shortened("encoder.layer.0.attention", 11)
        'enc…tention'
    """
    shown = visible(text)
    # After the escapes, each of which is up to ten characters long.
    head = limit // 3
    return shown if len(shown) <= limit else f"{shown[:head]}…{shown[len(shown) - (limit - head - 1) :]}"


def written(value: float) -> str:
    """A number as a person reads it: whole where it is a thousand or more, never with a tail of digits.

    Example:
        >>> written(0.30000000000000004), written(8094980.2), written(1e-05)
        ('0.3', '8,094,980', '1e-05')
    """
    if value and not 1e-3 <= abs(value) < 1e15:
        return f"{value:.3g}"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def _safe(text: str) -> str:
    return escape(visible(str(text)))


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose user waits in front of an empty cell."""
    ask = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = ask() if callable(ask) else None
    return type(shell).__name__ == "ZMQInteractiveShell"
