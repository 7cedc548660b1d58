"""One progress helper: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from secateur.report.safe_text import clean, seconds, writable
from secateur.shown import in_notebook


class ProgressStep(Protocol):
    """Callable as ``(done, total)``, with a note on what is reached."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show it."""


Clock = Callable[[], float]


@contextmanager
def progress(
    description: str,
    total: int | None = None,
    *,
    console: Console | None = None,
    interval: float = 5.0,
    clock: Clock = time.monotonic,
) -> Iterator[ProgressStep]:
    """Show how far a stage is, with the time that is left.

    Args:
        description: what is being done, for example "calibrate".
        total: number of steps if it is known beforehand.
        console: where to show it; standard error by default.
        interval: seconds between plain lines where there is no terminal.
        clock: source of time in seconds.

    Yields:
        ``step(done, total)``, to be called as often as is handy; it fits ``criteria.Context.progress``.

    Example:
        >>> with progress("score", 2) as step:
        ...     step(1, 2)
    """
    console = console or Console(stderr=True)  # standard output belongs to the result
    if in_notebook():
        line = _Line(clean(description), interval / 10, clock)
        yield line.step
        line.finish()
    elif console.is_terminal and not console.is_dumb_terminal:
        with _bar(console) as bar:
            shown = escape(writable(clean(description), console.encoding))
            task = bar.add_task(shown, total=total)

            def step(done: int, total: int, note: str = "") -> None:
                said = f"{shown} ({note})" if note else shown
                bar.update(task, completed=done, total=total or None, description=said)

            yield step
    else:
        lines = _Lines(clean(description), console, interval, clock)
        yield lines.step
        lines.finish()


def _bar(console: Console) -> Progress:
    # The word stands behind its number: "left" between two times was read as belonging to the first.
    times = (TimeElapsedColumn(), TextColumn("so far,"), TimeRemainingColumn(), TextColumn("left"))
    # Transient: when the stage is done its bar goes, and the report is what stays on the screen.
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    return Progress(*shown, console=console, transient=True)


class _Line:
    """One line that is written over, as a notebook's output takes it: no widgets, and no line per step."""

    def __init__(self, description: str, interval: float, clock: Clock) -> None:
        self._description, self._interval, self._clock = description, interval, clock
        self._start = self._last = clock()
        self._width = 0

    def step(self, done: int, total: int, note: str = "") -> None:
        now = self._clock()
        if now - self._last < self._interval and not _foretold(done, note):
            return
        self._last = now
        self._write(_said(done, total, now - self._start, note))

    def finish(self) -> None:
        if self._width:
            self._write(f"done in {seconds(self._clock() - self._start)}")
            sys.stderr.write("\n")
            sys.stderr.flush()

    def _write(self, text: str) -> None:
        text = f"{self._description}: {text}"
        sys.stderr.write(f"\r{text.ljust(self._width)}")
        sys.stderr.flush()
        self._width = len(text)


def _foretold(done: int, note: str) -> bool:
    """Whether this is a word on what is to come, which is worth nothing later."""
    return bool(note) and not done


def _said(done: int, total: int, spent: float, note: str) -> str:
    if _foretold(done, note):
        return note
    return _how_far(done, total, spent) + (f", {note}" if note else "")


def _how_far(done: int, total: int, spent: float) -> str:
    if not total:
        return f"{done}, {seconds(spent)} so far"
    left = f", about {seconds(spent / done * (total - done))} left" if done else ""
    return f"{done}/{total} ({100 * done // total} %), {seconds(spent)} so far{left}"


class _Lines:
    def __init__(self, description: str, console: Console, interval: float, clock: Clock) -> None:
        self._description, self._console = description, console
        self._interval, self._clock = interval, clock
        self._start = self._last = clock()
        self._printed = False

    def step(self, done: int, total: int, note: str = "") -> None:
        # Logs are kept: a line every few seconds at most, and none at all for a stage that is done before the first.
        now = self._clock()
        if now - self._last < self._interval and not _foretold(done, note):
            return
        self._last, self._printed = now, True
        self._print(_said(done, total, now - self._start, note))

    def finish(self) -> None:
        if self._printed:
            self._print(f"done in {seconds(self._clock() - self._start)}")

    def _print(self, line: str) -> None:
        shown = writable(f"{self._description}: {line}", self._console.encoding)
        self._console.print(Text(shown), soft_wrap=True)
