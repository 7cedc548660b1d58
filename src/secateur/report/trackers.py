"""Trackers of experiments, through the classes of accelerate: TensorBoard, W&B, MLflow, trackio and others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.errors import RecipeError, UnsupportedError
from secateur.report.record import TrainingPoint

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `track` knows by name; any other tracker is handed over as an object."""
Track = str | Mapping[str, object] | object


class Tracked:
    """Hands the course of a run to one tracker.

    Args:
        tracker: of accelerate's kind, started.
        settings: what the run was asked for.
    """

    def __init__(self, tracker: Any, settings: Mapping[str, object]) -> None:
        self._tracker, self._quiet, self._told = tracker, False, -1
        tracker.store_init_configuration(flat(settings))

    def step(self, stage: str, points: Sequence[TrainingPoint]) -> None:
        """Log the last point, and its quality once it is there."""
        last = points[-1]
        values = {"loss": last.loss, "lr": last.lr, "sparsity": last.sparsity}
        if last.step == self._told:
            values = {"quality": last.quality}
        self._told = last.step
        known = {f"train/{name}": value for name, value in values.items() if value is not None}
        if known:
            self._log(known, last.step)

    def figures(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log figures of quality under the name of the stage."""
        self._log({f"{stage}/{name}": value for name, value in values.items()}, step)

    def close(self, error: BaseException | None = None) -> None:
        """Finish the tracker's run."""
        self._safely(self._tracker.finish)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._safely(lambda: self._tracker.log(dict(values), step=step))

    def _safely(self, call: Any) -> None:
        if self._quiet:
            return
        try:
            call()
        except Exception as error:  # a tracker that has lost its server must not end a training of hours
            self._quiet = True
            warnings.warn(f"{_name(self._tracker)} logs no more: {error}", stacklevel=2)


def tracked(track: Sequence[Track], settings: Mapping[str, object], title: str) -> list[Tracked]:
    """Start trackers.

    Args:
        track: names, mappings of a name and its options, or objects of accelerate's kind.
        settings: what the run was asked for.
        title: of the run.

    Raises:
        RecipeError: an unknown name.
        UnsupportedError: accelerate or the tracker's package is missing, or the tracker does not start.
    """
    found: list[Tracked] = []
    for one in track:
        try:
            tracker = _made(one, title)
            if hasattr(tracker, "start"):
                tracker.start()
            found.append(Tracked(tracker, settings))
        except Exception as error:
            for started in found:
                started.close(error)
            if isinstance(error, (RecipeError, UnsupportedError)):
                raise
            raise UnsupportedError(
                f"the tracker {_name(one)} does not start",
                why=f"{type(error).__name__}: {error}",
                hint="see to its settings (account, server, folder), or leave track out",
            ) from error
    return found


def _made(one: Any, title: str) -> Any:
    if not isinstance(one, (str, Mapping)):
        missing = [part for part in ("store_init_configuration", "log", "finish") if not hasattr(one, part)]
        if missing:
            raise RecipeError(
                f"track: {type(one).__name__} is no tracker",
                why=f"it has no {missing[0]}",
                hint=f"name one ({', '.join(TRACKERS)}), or pass an accelerate.tracking.GeneralTracker",
            )
        return _ready() and one
    options = {"name": one} if isinstance(one, str) else dict(one)
    name = str(options.pop("name", ""))
    if name not in TRACKERS:
        raise RecipeError(f"track: unknown tracker {name!r}", hint=f"known are {', '.join(TRACKERS)}")
    _ready(name)
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in [str(known) for known in get_available_trackers()]:
        raise UnsupportedError(f"track: {name} needs the package {name}", hint=f"pip install {name}")
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        options.setdefault("logging_dir", "runs")
    return kind(options.pop("project", project_of(title)), **options)


def project_of(title: str) -> str:
    """The title of a run as every tracker takes it: W&B refuses `:` and `/`, and TensorBoard makes a folder of it.

    Example:
        >>> project_of("nets/mine.py:build")
        'nets-mine.py-build'
    """
    return re.sub(r"[^\w.-]+", "-", title)[-100:].strip("-.") or "secateur"


def _ready(name: str = "") -> bool:
    """Accelerate's trackers ask it who the main process is, so it has to know before the first one starts."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UnsupportedError(
            f"track: {name or 'trackers'} needs accelerate", hint="pip install 'secateur[train]'"
        ) from error
    PartialState()
    return True


def _name(tracker: Any) -> str:
    return str(getattr(tracker, "name", tracker))


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings as trackers take them: one level, plain values.

    Example:
        >>> flat({"target": {"params": 0.5}, "recover": [{"method": "refit"}], "round_to": None})
        {'target.params': 0.5, 'recover.0.method': 'refit'}
    """
    found: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, (list, tuple)):
            value = {str(number): part for number, part in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
