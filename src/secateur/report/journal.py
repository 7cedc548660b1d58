"""What is kept while a run goes: how long its stages took, what degraded it, what its criteria doubt."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from secateur.criteria import StationaryWarning
from secateur.statistics.notes import CurvatureWarning
from secateur.types import Degradation

Progress = Callable[[str, int, int], None]
Step = Callable[[int, int], None]


class Journal:
    """Times the stages, keeps the log, passes progress on."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.log: list[dict[str, Any]] = []
        self.degradations: list[Degradation] = []
        self.doubts: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a stage, and keep its wall time under its name."""
        started = time.perf_counter()
        if self.progress is not None:
            self.progress(name, 0, 0)
        yield
        self.seconds[name] = round(time.perf_counter() - started, 4)
        self.log.append({"stage": name, "seconds": self.seconds[name]})

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Criteria warn of fallbacks, which degrade the run, and of doubts, which the report repeats."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for one in caught:
            if issubclass(one.category, CurvatureWarning):
                self.degradations.append(Degradation("score", str(one.message)))
            elif issubclass(one.category, StationaryWarning):
                self.doubts.append(str(one.message))
            else:
                # Nobody here knows it, so it goes on to the caller, from the line that it came from.
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def step(self, name: str) -> Step:
        """A ``step(done, total)`` that tells of progress inside the stage `name`."""

        def report_step(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total)

        return report_step
