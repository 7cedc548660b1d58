"""Put a report together from what the stages measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata

from pydantic import JsonValue

from secateur.measure.machine import processor
from secateur.report.bound import Limit
from secateur.report.record import (
    ZEROS_ONLY,
    Applied,
    Choice,
    Control,
    Environment,
    Layer,
    Locked,
    NetworkPart,
    Report,
    TrainingPoint,
    UnitCount,
    status_of,
)
from secateur.types import Certificate, Condition, Degradation, LeftOut, Snapshot


@dataclass(frozen=True)
class Origin:
    """What was pruned, where, and how it is done again.

    Args:
        title: what was pruned, for example "demo:digits".
        fingerprint: of the model that was pruned.
        environment: see `environment`.
        command: shell line that reproduces the run.
        recipe: the resolved recipe as plain data.
    """

    title: str
    fingerprint: str
    environment: Environment
    command: str = ""
    recipe: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """How it was decided what goes.

    Args:
        criterion: name and options.
        granularity: name and options.
        scope: where units competed.
        allocation: name and options.
    """

    criterion: Choice
    granularity: Choice
    scope: str
    allocation: Choice


@dataclass(frozen=True)
class Effect:
    """What went, and what the model is before and after.

    Args:
        before: the model as it came.
        after: the model as it goes.
        applied: "cut", "mask" or "packed" (zeros run by a sparse kernel).
        units: removed and total units, and what a unit is ("channels").
        certificate: of the cut, or None with a reason.
        certificate_reason: why there is no certificate, for example "nothing was cut".
        conditions: what the certificate depends on.
        after_cut_quality: quality right after the cut, before any recovery.
        quality_on: which data the quality figures are of.
        quality_missing: why there are none.
        quality_samples: on how many samples a figure is a share.
        control: the original after the same recovery steps, where that was asked for.
        left_out: weights that the masks do not cover.
    """

    before: Snapshot
    after: Snapshot
    applied: Applied
    units: UnitCount
    certificate: Certificate | None
    certificate_reason: str = ""
    after_cut_quality: Mapping[str, float] | None = None
    quality_on: str = ""
    quality_missing: str = ""
    quality_samples: Mapping[str, int] = field(default_factory=dict)
    control: Control | None = None
    left_out: Sequence[LeftOut] = ()
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Goal:
    """What was asked, and whether it was reached.

    Args:
        target: for example {"macs": 0.5}.
        achieved: the same keys, measured.
        missed: whether the target was not reached.
        limit: what was found for "at most this loss".
    """

    target: Mapping[str, float] = field(default_factory=dict)
    achieved: Mapping[str, float] = field(default_factory=dict)
    missed: bool = False
    limit: Limit | None = None


@dataclass(frozen=True)
class Events:
    """What happened on the way.

    Args:
        seconds: stage to wall time.
        degradations: what was done less well than asked.
        warnings: sentences for the reader.
        training: logged steps of recovery.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    degradations: Sequence[Degradation] = ()
    warnings: Sequence[str] = ()
    training: Sequence[TrainingPoint] = ()


def build(
    origin: Origin,
    method: Method,
    effect: Effect,
    *,
    goal: Goal | None = None,
    events: Events | None = None,
    layers: Sequence[Layer] = (),
    network: Sequence[NetworkPart] = (),
    locked: Sequence[Locked] = (),
) -> Report:
    """Put a report together; the status, the sparsity and the warning about zeros follow from the rest.

    Args:
        origin: what was pruned.
        method: how it was decided what goes.
        effect: what went, and what that brought.
        goal: what was asked; nothing by default.
        events: what happened on the way; nothing by default.
        layers: see `secateur.report.layers`.
        network: see `secateur.report.network`.
        locked: what could not be cut.

    Returns:
        A validated report.

    Raises:
        ValidationError: parts that contradict each other (a bug of the caller).
    """
    goal, events = goal or Goal(), events or Events()
    # Zeros without a word about speed are how pruning is oversold, so nobody who builds a report can leave it out.
    told = [ZEROS_ONLY, *events.warnings] if effect.applied == "mask" else events.warnings
    return Report(
        status=status_of(events.degradations, target_missed=goal.missed),
        title=origin.title,
        applied=effect.applied,
        before=effect.before,
        after=effect.after,
        after_cut_quality=None if effect.after_cut_quality is None else dict(effect.after_cut_quality),
        quality_on=effect.quality_on,
        quality_missing=effect.quality_missing,
        quality_samples=dict(effect.quality_samples),
        control=effect.control,
        sparsity=effect.units.sparsity,
        units=effect.units,
        criterion=method.criterion,
        granularity=method.granularity,
        scope=method.scope,
        allocation=method.allocation,
        target=dict(goal.target),
        achieved=dict(goal.achieved),
        limit=goal.limit,
        certificate=effect.certificate,
        certificate_reason=effect.certificate_reason,
        conditions=effect.conditions,
        degradations=tuple(events.degradations),
        seconds=dict(events.seconds),
        layers=tuple(layers),
        network=tuple(network),
        locked=tuple(locked),
        left_out=tuple(effect.left_out),
        model_sparsity=_model_sparsity(effect),
        training=tuple(events.training),
        warnings=tuple(dict.fromkeys(told)),  # several criteria may doubt the same thing
        command=origin.command,
        recipe=dict(origin.recipe),
        environment=origin.environment,
        fingerprint=origin.fingerprint,
    )


def _model_sparsity(effect: Effect) -> float | None:
    whole = effect.before.params
    return 1 - min(effect.after.nonzero, whole) / whole if whole else None


def environment(*, device: str = "cpu", seed: int = 0) -> Environment:
    """Describe this machine and its versions, without host or user name.

    Args:
        device: the device that the run used.
        seed: of the run.

    Returns:
        The environment part of a report.

    Example:
        >>> environment(seed=7).seed
        7
    """
    import torch

    # Run from a source tree without installation there is no metadata, and a guess would be worse than saying so.
    try:
        version = metadata.version("secateur")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return Environment(
        python=platform.python_version(),
        torch=str(torch.__version__),
        platform=platform.platform(),
        cpu=processor(),
        threads=torch.get_num_threads(),
        device=device,
        seed=seed,
        secateur=version,
    )
