"""Put a record together from what the stages measured."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.report.record import (
    ZEROS_ONLY,
    Choice,
    Control,
    Environment,
    Fallback,
    Layer,
    Locked,
    Proof,
    Record,
    State,
    TrainingPoint,
    Units,
    numbers,
    status_of,
)

if TYPE_CHECKING:
    from secateur import types


def build(
    title: str,
    *,
    before: types.Snapshot,
    after: types.Snapshot,
    applied: Literal["cut", "mask", "packed"],
    units: Units,
    criterion: Choice,
    granularity: Choice,
    scope: str,
    allocation: Choice,
    environment: Environment,
    fingerprint: str,
    certificate: types.Certificate | None,
    certificate_reason: str = "",
    target: Mapping[str, float] | None = None,
    achieved: Mapping[str, float] | None = None,
    target_missed: bool = False,
    after_cut_quality: Mapping[str, float] | None = None,
    quality_on: str = "",
    quality_missing: str = "",
    control: Control | None = None,
    degradations: Iterable[types.Degradation] = (),
    seconds: Mapping[str, float] | None = None,
    layers: Iterable[Layer] = (),
    locked: Iterable[Locked] = (),
    training: Iterable[TrainingPoint] = (),
    warnings: Iterable[str] = (),
    command: str = "",
    recipe: Mapping[str, Any] | None = None,
) -> Record:
    """Put a record together; the status, the sparsity and the warning about zeros follow from the rest.

    Args:
        title: what was pruned, for example "demo:digits".
        before: the model as it came.
        after: the model as it goes.
        applied: "cut", "mask" or "packed" (zeros run by a sparse kernel).
        units: removed and total units, and what a unit is ("channels").
        criterion: name and options.
        granularity: name and options.
        scope: where units competed.
        allocation: name and options.
        environment: see ``environment``.
        fingerprint: of the model that was pruned.
        certificate: of the cut, or None with a reason.
        certificate_reason: why there is no certificate, for example "nothing was cut".
        target: what was asked, for example {"macs": 0.5}.
        achieved: the same keys, measured.
        target_missed: whether the target was not reached.
        after_cut_quality: quality right after the cut, before any recovery.
        quality_on: which data the quality figures are of.
        quality_missing: why there are none.
        control: the original after the same recovery steps, where that was asked for.
        degradations: what was done less well than asked.
        seconds: stage to wall time.
        layers: see ``Layer.measure``.
        locked: see ``Locked.of``.
        training: logged steps of recovery.
        warnings: further sentences for the reader.
        command: shell line that reproduces the run.
        recipe: the resolved recipe as plain data.

    Returns:
        A validated record.

    Raises:
        ValidationError: parts that contradict each other (a bug of the caller).
    """
    fallbacks = tuple(Fallback.of(one) for one in degradations)
    told = list(dict.fromkeys([*([ZEROS_ONLY] if applied == "mask" else []), *warnings]))
    return Record(
        status=status_of(fallbacks, target_missed=target_missed),
        title=title,
        applied=applied,
        before=State.of(before),
        after=State.of(after),
        after_cut_quality=None if after_cut_quality is None else numbers(after_cut_quality),
        quality_on=quality_on,
        quality_missing=quality_missing,
        control=control,
        sparsity=units.sparsity,
        units=units,
        criterion=criterion,
        granularity=granularity,
        scope=scope,
        allocation=allocation,
        target=numbers(target or {}),
        achieved=numbers(achieved or {}),
        certificate=None if certificate is None else Proof.of(certificate),
        certificate_reason=certificate_reason,
        degradations=fallbacks,
        seconds=numbers(seconds or {}),
        layers=tuple(layers),
        locked=tuple(locked),
        training=tuple(training),
        warnings=tuple(told),
        command=command,
        recipe=dict(recipe or {}),
        environment=environment,
        fingerprint=fingerprint,
    )


def environment(*, device: str = "cpu", seed: int = 0) -> Environment:
    """Describe this machine and its versions, without host or user name.

    Args:
        device: the device that the run used.
        seed: of the run.

    Returns:
        The environment part of a record.

    Example:
        >>> environment(seed=7).seed
        7
    """
    import torch

    try:
        version = metadata.version("secateur")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return Environment(
        python=platform.python_version(),
        torch=str(torch.__version__),
        platform=platform.platform(),
        cpu=_cpu(),
        threads=torch.get_num_threads(),
        device=device,
        seed=seed,
        secateur=version,
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "unknown"
