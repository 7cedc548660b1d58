"""The progress of a run: one bar or line per stage, with the time that is left."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from secateur.cli.console import err


class Stages:
    """Callable as ``(stage, done, total)``, which is what `secateur.prune` wants; closes with the block."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is; a new name ends the stage before."""
        from secateur.report import progress

        if stage != self._stage:
            self._stack.close()
            self._stage = stage
            self._step = self._stack.enter_context(progress(stage, total or None, console=err(), interval=2.0))
        self._step(done, total)

    def of(self, stage: str) -> StageStep:
        """The same for one stage, as ``(done, total)``."""
        return StageStep(self, stage)


class StageStep:
    """Callable as ``(done, total)``."""

    def __init__(self, stages: Stages, stage: str) -> None:
        self._stages, self._stage = stages, stage

    def __call__(self, done: int, total: int) -> None:
        """Pass it on with the stage's name."""
        self._stages(self._stage, done, total)
