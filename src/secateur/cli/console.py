"""Where words go: data to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def out() -> Console:
    """Standard output, for what was asked for."""
    return Console(highlight=False)


def err() -> Console:
    """Standard error, for progress, notes and errors."""
    return Console(stderr=True, highlight=False)


def emit(data: object) -> None:
    """Write data as JSON to standard output."""
    write(json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write(text: str) -> None:
    """Write text to standard output as it is; a reader that has gone away is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit, and would complain about the same pipe again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str, *, style: str = "") -> None:
    """Write a note to standard error, letter by letter: no markup, no escape sequences."""
    from secateur.report.safe_text import clean

    tell(err(), Text(clean(text, lines=True), style=style))


def tell(console: Console, text: Text) -> None:
    """Print a sentence: wrapped between words on a terminal, as one line elsewhere, where `grep` should find it."""
    console.print(text, soft_wrap=not console.is_terminal or console.is_dumb_terminal)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table on a terminal, aligned plain lines elsewhere.

    Args:
        head: names of the columns.
        rows: cells as text; names from models may be among them.
        title: a line above.
    """
    from secateur.report.safe_text import clean

    console, cells = out(), [[clean(cell) for cell in row] for row in rows]
    if not console.is_terminal or console.is_dumb_terminal:
        lines = [[*head], *cells]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        write("\n".join([*([title] if title else []), *text]) + "\n")
        return
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=Text(clean(title), style="bold") if title else None,
        title_justify="left",
    )
    for name in head:
        shown.add_column(name, overflow="fold")
    for row in cells:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
