"""The progress of a whole run: one bar or line per stage, on the command line, in a terminal and in a notebook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from rich.console import Console

from secateur.report.progress import progress
from secateur.shown import in_notebook

P = ParamSpec("P")
R = TypeVar("R")


class Stages:
    """Callable as ``(stage, done, total)``, which is what `secateur.prune` wants; closes with the block.

    Args:
        console: where to show it; standard error by default.
    """

    takes_note = True

    def __init__(self, console: Console | None = None) -> None:
        self._stack = ExitStack()
        self._stage = ""
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show how far a stage is, and a word on what it has reached; a new name ends the stage before."""
        if stage != self._stage:
            self._stack.close()
            self._stage = stage
            console = self._console or Console(stderr=True, highlight=False)
            self._step = self._stack.enter_context(progress(stage, total or None, console=console, interval=2.0))
        self._step(done, total, note)

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


def shows_progress(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a function with ``progress=``: True shows it, False does not, None does in a notebook.

    Example:
        >>> @shows_progress
        ... def run(*, progress=None):
        ...     return progress
        >>> run(progress=False) is None, type(run(progress=True)).__name__
        (True, 'Stages')
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = kwargs.get("progress")
        if given is False or (given is None and not in_notebook()):
            kwargs["progress"] = None
            return function(*args, **kwargs)
        if given not in (None, True):
            return function(*args, **kwargs)
        with Stages() as stages:
            kwargs["progress"] = stages
            return function(*args, **kwargs)

    return run
