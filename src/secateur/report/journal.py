"""What is kept while a run goes: how long its stages took, what degraded it, what its criteria doubt."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TextIO, TypedDict

from torch import nn

from secateur.criteria import CostWarning, StationaryWarning
from secateur.errors import NonFiniteError
from secateur.recover.damage import LostZerosWarning
from secateur.recover.loop import TrainStep
from secateur.report.assembly import Events
from secateur.report.record import TrainingPoint
from secateur.report.watch import RunWatcher
from secateur.solve.ridge import RefitWarning
from secateur.statistics.notes import CurvatureWarning
from secateur.types import Advance, Degradation, Progress


class LogLine(TypedDict):
    """One line of log.jsonl: a stage that ended, and its wall time."""

    stage: str
    seconds: float


class JournalState(TypedDict):
    """A journal as plain data."""

    seconds: dict[str, float]
    log: list[LogLine]
    degradations: list[dict[str, str]]
    doubts: list[str]
    training: list[dict[str, object]]


class Journal:
    """Times the stages, keeps the log, passes progress on.

    Args:
        progress: called as ``progress(stage, done, total)``; total 0 = not known.
        doubts: sentences for the report that were known before the run.
    """

    def __init__(self, progress: Progress | None = None, doubts: Sequence[str] = ()) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.log: list[LogLine] = []
        self.degradations: list[Degradation] = []
        self.doubts: list[str] = list(doubts)
        self.training: list[TrainingPoint] = []
        self.watchers: list[RunWatcher] = []
        self._stage = ""
        self.look: Callable[[nn.Module], Mapping[str, float]] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a stage, and keep its wall time under its name."""
        started, self._stage = time.perf_counter(), name
        if self.progress is not None:
            self.progress(name, 0, 0)
        yield
        # Only a stage that ended well is kept: after an error there is no report to stand in. What an earlier process
        # has finished took the time that it took there.
        if name in self.seconds:
            return
        self.seconds[name] = round(time.perf_counter() - started, 4)
        self.log.append({"stage": name, "seconds": self.seconds[name]})

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Criteria and refits warn of fallbacks, which degrade the run, and of doubts, which the report repeats."""
        others: list[warnings.WarningMessage] = []

        def notice(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            # At once: what the stage has found may be kept before it ends, and these words with it.
            if issubclass(category, CurvatureWarning):
                self.degradations.append(Degradation("score", str(message)))
            elif issubclass(category, (StationaryWarning, CostWarning, RefitWarning, LostZerosWarning)):
                self.doubts.append(str(message))
                if issubclass(category, CostWarning):  # before what takes so long
                    _Step(self.progress, self._stage)(0, 0, str(message))
            else:
                others.append(warnings.WarningMessage(message, category, filename, lineno, file, line))

        with warnings.catch_warnings():
            # A filter of the caller's must not decide whether a run counts as degraded.
            warnings.simplefilter("always")
            warnings.showwarning = notice
            yield
        for one in others:
            # Nobody here knows it, so it goes on to the caller, from the line that it came from.
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def step(self, name: str) -> Advance:
        """A ``step(done, total)`` that tells of progress inside the stage `name`."""
        return _Step(self.progress, name)

    def curve(self, name: str) -> Advance:
        """The same for a training whose curve the report holds: those who watch the run are told of every step."""
        return _Curve(self, name) if self.watchers else self.step(name)

    def figures(self, stage: str, values: Mapping[str, float] | None) -> None:
        """Tell those who watch of the quality at this place of the run."""
        for watcher in self.watchers:
            watcher.figures(stage, len(self.training), values or {})

    def watched(self, error: BaseException | None = None) -> None:
        """The run has ended: so has the watching."""
        for watcher in self.watchers:
            watcher.close(error)

    def state_dict(self) -> JournalState:
        """All of it as plain data."""
        return {
            "seconds": self.seconds,
            "log": [line.copy() for line in self.log],
            "degradations": [asdict(one) for one in self.degradations],
            "doubts": self.doubts,
            "training": [point.model_dump() for point in self.training],
        }

    def load_state_dict(self, state: JournalState) -> None:
        """Take over what an earlier process of the same run has kept."""
        self.seconds, self.doubts = dict(state["seconds"]), list(state["doubts"])
        self.log = [LogLine(stage=line["stage"], seconds=line["seconds"]) for line in state["log"]]
        self.degradations = [Degradation(**one) for one in state["degradations"]]
        self.training = [TrainingPoint.model_validate(point) for point in state["training"]]

    def events(self) -> Events:
        """What happened up to now, as a report holds it."""
        return Events(self.seconds, self.degradations, self.doubts, self.training)


class _Step:
    """Callable as ``(done, total)``; a note goes on where the progress shows notes, as bars and lines of ours do."""

    takes_note = True

    def __init__(self, progress: Progress | None, name: str) -> None:
        self._progress, self._name = progress, name

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Pass it on with the stage's name."""
        if self._progress is None:
            return
        if note and getattr(self._progress, "takes_note", False):
            self._progress(self._name, done, total, note)  # type: ignore[call-arg]
        else:
            self._progress(self._name, done, total)


class _Curve(_Step):
    """Tells those who watch a run of every step, and of the quality after every pass."""

    def __init__(self, journal: Journal, name: str) -> None:
        super().__init__(journal.progress, name)
        self._journal, self._points = journal, list(journal.training)
        self._first = len(self._points)

    def watch(self, records: Sequence[TrainStep]) -> None:
        """Called after every step with all of them, those of an earlier process included."""
        done = len(self._points) - self._first
        # The last one again: it may have got its quality since.
        fresh = [point(self._first, record) for record in records[max(done - 1, 0) :]]
        if not fresh or (done == len(records) and fresh[-1] == self._points[-1]):
            return
        self._points[self._first + max(done - 1, 0) :] = fresh
        for watcher in self._journal.watchers:
            watcher.step(self._name, self._points)

    def quality(self, model: nn.Module) -> float | None:
        """The first figure of quality, which is the one that the curve shows; None where outputs are not finite."""
        found: Mapping[str, float] | None = None
        # Who watches ends no run: a training that went wrong is refused by its next step, which says where.
        with suppress(NonFiniteError):
            found = None if self._journal.look is None else self._journal.look(model)
        return next(iter(found.values()), None) if found else None


def point(first: int, record: TrainStep) -> TrainingPoint:
    """A step of a training as a report holds it, behind `first` steps of trainings before it."""
    return TrainingPoint(
        step=first + record.step, loss=record.loss, lr=record.lr, quality=record.quality, sparsity=record.sparsity
    )
