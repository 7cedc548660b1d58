"""Live curves and trackers for a training loop of the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from secateur.errors import FileRefusedError, RecipeError
from secateur.registry import real_number
from secateur.report.record import TrainingPoint
from secateur.report.trackers import Track, tracked
from secateur.report.watch import LivePage, RunWatcher


class Live:
    """Draws the curves of a loop on a page while it trains, and hands them to trackers of experiments.

    Use it in a ``with`` block, so that the page knows when the training has ended. What goes wrong with page or tracker
    once it has begun (a full disk, a server that is gone) does not end the training.

    Args:
        page: where the page goes; it loads itself again. None draws none.
        track: names, mappings or objects, as `secateur.prune` takes them.
        title: what page and trackers call the run.
        settings: plain values that trackers are told at the beginning.
        every: seconds between two versions of the page.

    Raises:
        RecipeError: neither page nor tracker, or an unknown tracker.
        UnsupportedError: the tracker's package is missing, or it does not start.
        FileRefusedError: the page's folder does not exist.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "progress.html"
        >>> with Live(path) as live:
        ...     for step in range(3):
        ...         live.log(loss=1 / (step + 1), sparsity=0.3 * step)
        >>> "The training has ended." in path.read_text()
        True
    """

    def __init__(
        self,
        page: str | Path | None = None,
        *,
        track: Track | Sequence[Track] = (),
        title: str = "training",
        settings: Mapping[str, object] | None = None,
        every: float = 5.0,
    ) -> None:
        trackers = list(track) if isinstance(track, (list, tuple)) else [track]
        if page is None and not trackers:
            raise RecipeError("there is nothing to watch with", hint="name a page, or a tracker: track='tensorboard'")
        if page is not None and not Path(page).absolute().parent.is_dir():
            raise FileRefusedError(
                f"cannot write {page}: its folder does not exist", hint="choose a folder that exists"
            )
        self._title, self._points = title, list[TrainingPoint]()
        self._watchers: list[RunWatcher] = [*tracked(trackers, settings or {}, title)]
        if page is not None:
            self._watchers.append(LivePage(Path(page), title, every=real_number("every", every)))

    def log(
        self,
        loss: object,
        *,
        lr: float = 0.0,
        sparsity: float | None = None,
        quality: float | None = None,
        step: int | None = None,
    ) -> None:
        """Tell of one step.

        Args:
            loss: a number, or a tensor with one.
            lr: learning rate; it is drawn where it was given.
            sparsity: for example `secateur.Pruner.sparsity`.
            quality: where it was measured at this step.
            step: by default the number of steps that were logged before.

        Raises:
            RecipeError: the loss is no number, or steps do not rise.
        """
        at = self._next() if step is None else step
        if at < self._next():
            raise RecipeError(f"step {at} comes behind step {self._next() - 1}", hint="steps rise from call to call")
        point = TrainingPoint(step=at, loss=_number(loss), lr=lr, sparsity=sparsity)
        self._points.append(point)
        self._tell()
        if quality is not None:
            # Twice, as in a run: quality is known behind the step that it belongs to.
            self._points[-1] = point.model_copy(update={"quality": quality})
            self._tell()

    def close(self) -> None:
        """The training has ended: the page no longer loads itself again, and trackers finish."""
        for watcher in self._watchers:
            watcher.close()
        self._watchers = []

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> int:
        return self._points[-1].step + 1 if self._points else 0

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher.step(self._title, self._points)


def _number(loss: object) -> float | None:
    """The loss as the page draws it: a gap where it is not finite."""
    detach = getattr(loss, "detach", None)  # asked for by name: reports are drawn without torch
    try:
        value = float(detach() if callable(detach) else loss)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise RecipeError(f"loss is a {type(loss).__name__} and no number", hint="loss.item() of a mean") from None
    return value if math.isfinite(value) else None
