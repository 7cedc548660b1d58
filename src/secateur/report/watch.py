"""Those who watch a training while it runs: the page of live curves, and trackers of experiments."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from secateur.drawing import page_parts
from secateur.report.charts import training
from secateur.report.html import pages
from secateur.report.progress import Clock
from secateur.report.record import TrainingPoint

MOST = 2000
"""Points of a curve on the live page; of more, every so-manieth is drawn, and the report has them all."""


class RunWatcher(Protocol):
    """Who is told of every step of a training, and of figures between."""

    def step(self, stage: str, points: Sequence[TrainingPoint]) -> None:
        """Called after every step; the last point is new, or has got its quality."""

    def figures(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Called with figures of quality."""

    def close(self, error: BaseException | None = None) -> None:
        """Called once, when the run has ended."""


class LivePage:
    """Loss, quality and sparsity as curves on one page that opens offline and loads itself again while a run goes on.

    Args:
        path: of the page; replaced as a whole, so that a browser never reads half of it.
        title: what the page calls the run.
        every: seconds between two versions; where writing is slow there are fewer, to take little of the time.
        after: seconds before the first version; of a run that ends before there is none at all.
        clock: source of time in seconds.
    """

    def __init__(
        self, path: Path, title: str, *, every: float = 5.0, after: float = 0.0, clock: Clock = time.monotonic
    ) -> None:
        self._path, self._title, self._every, self._clock = path, title, every, clock
        self._due, self._stage, self._there = clock() + after, "", after == 0
        self._points: Sequence[TrainingPoint] = ()

    def step(self, stage: str, points: Sequence[TrainingPoint]) -> None:
        """Write the page, if it is time."""
        self._points, self._stage = points, stage
        if self._clock() >= self._due:
            self._write(over=False)

    def figures(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Nothing: quality stands in the points."""

    def close(self, error: BaseException | None = None) -> None:
        """Write it a last time: it no longer loads itself again."""
        if self._points and self._there:
            self._write(over=True)

    def _write(self, *, over: bool) -> None:
        began, self._there = self._clock(), True
        aside = self._path.with_name(f".{self._path.name}")
        # A full disk or a folder that is gone must not end a training of hours for the sake of a drawing. Nor does
        # it wait for the disk: after a loss of power nobody misses it.
        with suppress(OSError):
            aside.write_text(self._page(over=over), encoding="utf-8")
            aside.replace(self._path)
        now = self._clock()
        self._due = now + max(self._every, 20 * (now - began))

    def _page(self, *, over: bool) -> str:
        points = self._points[:: -(-len(self._points) // MOST)]
        if points[-1] is not self._points[-1]:
            points = [*points, self._points[-1]]
        return pages().get_template("live.html").render(
            title=self._title, stage=self._stage, last=self._points[-1], over=over,
            refresh=max(2, round(self._every)), training=training(points), **page_parts(),
        )  # fmt: skip
