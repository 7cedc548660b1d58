"""The fair comparison of criteria on the user's own model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from secateur.comparison.cells import SeedRun, planned
from secateur.comparison.protocol import (
    Choice,
    Entry,
    Protocol,
    Steps,
    among,
    check_steps,
    hash_batches,
    make_entries,
    make_levels,
    make_match,
    make_recoveries,
    plain_granularity,
)
from secateur.comparison.report import publish
from secateur.comparison.statistics import require_scipy
from secateur.comparison.store import Store
from secateur.comparison.summary import summarise
from secateur.errors import InputError, RecipeError
from secateur.kinds.weights.granularity import Granularity
from secateur.measure import quality
from secateur.measure.quality import higher_is_better
from secateur.model.call import batch_size_of, device_of, require_reiterable, to_example, with_batch_size
from secateur.report import environment
from secateur.types import Batch, Data, Evaluate, Example, Loss

Models = nn.Module | Sequence[nn.Module] | Mapping[int, nn.Module] | Callable[[int], nn.Module]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison found.

    Args:
        rows: one mapping per run, also of runs that were refused or diverged (``status``, ``why``).
        summary: curves, differences, tests, costs: what the report shows.
        protocol: what was held fixed.
        manifest: protocol, hashes, environment; enough to repeat it.
        out: the folder with results.csv, summary.json, manifest.json, compare.html and compare.md.
        reused: runs whose results were there already.
    """

    rows: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    protocol: Protocol
    manifest: dict[str, Any]
    out: Path
    reused: int


def compare(
    models: Models,
    data: Data | None = None,
    *,
    criteria: Sequence[Choice],
    evaluate: Evaluate,
    out: str | Path,
    granularity: str | Mapping[str, Any] | Granularity = "channel",
    levels: Sequence[float] | None = None,
    match: str = "auto",
    seeds: int | Sequence[int] = 3,
    calibration: Data | None = None,
    calibration_batches: int = 8,
    example: Example = None,
    loss: Loss | None = None,
    recover: Steps | Mapping[str, Steps] | None = None,
    recover_levels: Sequence[float] | None = None,
    ablation_levels: Sequence[float] | None = None,
    scratch: Steps = (),
    scope: str = "global",
    allocation: str = "global",
    protect: Sequence[str] = (),
    metric: str | None = None,
    maximize: bool | None = None,
    rounds: int = 30,
    probes: int = 64,
    confidence: float = 0.95,
    tag: str = "",
    title: str = "",
    command: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Compare criteria fairly: same base models, samples, batches and budget for all of them.

    For every seed all criteria score the same base model with the same samples in the same order, and are recovered
    with the same steps on the same batches (hashed, and compared afterwards). Levels are matched exactly. Always run
    with them are: magnitude, the reference of all differences; random scores; the dense model, also with the same
    extra training; and at the middle level every criterion's own scores, shuffled within the layers and inverted.
    A bad choice for picking a winner from one seed: with one there is no test, and the report says so.

    Args:
        models: a trained model (the seeds then vary scoring and recovery only), one per seed, or a function
            ``seed -> model``. Never changed.
        data: training batches for recovery; also for scores where `calibration` is left out.
        criteria: names, {"name": ..., options} or objects.
        evaluate: ``evaluate(model) -> number or mapping``, on samples that neither scoring nor training sees.
        out: folder of the results. Runs that are there already are not done again, so the same call goes on after
            a kill, and more levels, seeds or criteria may be added later.
        granularity: as in a recipe.
        levels: fractions removed; default six: geometric in what is left for masks, 20 to 85 % of the
            multiply-accumulates for cuts.
        match: what levels count: "units" (exact counts), "macs" or "params"; "auto" is macs for cuts,
            params for experts.
        seeds: how many, or which. Three cannot separate differences below 2.5 standard deviations.
        calibration: batches to score with.
        calibration_batches: batches taken from `data` where `calibration` is left out.
        example: forward inputs; default the first sample of the scoring data.
        loss: ``loss(model, batch) -> scalar``; default from the batches.
        recover: recovery steps as in a recipe, or several named lists of them. Without recovery is always run.
        recover_levels: levels at which recovery is run; default all.
        ablation_levels: levels of the shuffled and inverted controls; default the middle one.
        scratch: steps that train the equal-size network (magnitude's choice) from new weights; left out = not run.
        scope: where units compete.
        allocation: how a global amount is spread.
        protect: names or patterns that stay whole.
        metric: which quality is compared; default the first that `evaluate` names.
        maximize: whether higher is better; default by the name: loss, error, perplexity and the like are lower.
        rounds: timed forward passes of each cut model, in turns with the dense one; 0 = none.
        probes: units per seed whose removal alone is measured on the scoring samples, to see what each score tells of
            the loss; one forward pass over them each; 0 = none.
        confidence: of intervals; tests are at 1 - confidence.
        tag: free text that joins the addresses of the results: change it when `evaluate` or `loss` change.
        title: what the report calls the comparison.
        command: the command line that repeats it.
        progress: called as ``progress("compare", done, total)`` after every run.

    Returns:
        rows, summary and where the files lie.

    Raises:
        RecipeError: an unknown name, a level out of range, a wrong step.
        InputError: no data where it is needed.
        UnsupportedError: scipy is missing and there is more than one seed.

    Cost: per seed and criterion one scoring; per level one plan, one evaluation, and each recovery.

    Source: Blalock et al., "What is the State of Neural Network Pruning?", 2020, section 6 (protocol); Frankle et
    al., "Pruning Neural Networks at Initialization", 2021, section 5 (shuffled and inverted scores).
    """
    entries, chosen = make_entries(criteria), _seeds(seeds)
    batches = _scoring_batches(data, calibration, calibration_batches)
    example = with_batch_size(to_example(batches[0]), 1) if example is None else example
    build = _builder(models, chosen)
    first = build(chosen[0])
    name = _metric(metric, quality(first, evaluate))
    matched, recoveries = make_match(match, granularity), make_recoveries(recover)
    strengths, training = make_levels(levels, matched, granularity), len(recoveries) > 1 or bool(scratch)
    steps = [*scratch, *(step for recovery in recoveries.values() for step in recovery)]
    if any(step["method"] != "refit" for step in steps):
        _require_training_data(data)
    middle = [strengths[(len(strengths) - 1) // 2]]
    protocol = Protocol(
        granularity=plain_granularity(granularity),
        match=matched,
        levels=strengths,
        recoveries=recoveries,
        recover_levels=among("recover_levels", recover_levels or strengths, strengths) if training else (),
        ablation_levels=among("ablation_levels", middle if ablation_levels is None else ablation_levels, strengths),
        scope=scope,
        allocation=allocation,
        protect=tuple(protect),
        seeds=chosen,
        metric=name,
        maximize=higher_is_better(name) if maximize is None else maximize,
        rounds=rounds,
        confidence=confidence,
        probes=probes,
        scratch=check_steps(scratch) if scratch else (),
        tag=tag,
    )
    store, count = Store(out), _Counter(len(planned(protocol, entries)), progress)
    rows: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    for seed in chosen:
        base = first if seed == chosen[0] else build(seed)
        run = SeedRun(
            protocol,
            entries,
            seed=seed,
            base=base,
            batches=batches,
            train=data,
            example=example,
            evaluate=evaluate,
            loss=loss,
            store=store,
        )
        rows += [count(*run.result(cell)) for cell in run.cells()]
        told.append(run.fidelity())
    summary = summarise(rows, protocol, told, [name for name, _ in first.named_modules()])
    manifest = _manifest(protocol, entries, batches, rows, first, title=title, command=command)
    publish(store.folder, rows, summary, manifest)
    return Comparison(tuple(rows), summary, protocol, manifest, store.folder, count.reused)


class _Counter:
    """Counts the runs as they come in, and passes that on."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.done = self.reused = 0

    def __call__(self, row: dict[str, Any], known: bool) -> dict[str, Any]:
        self.done, self.reused = self.done + 1, self.reused + known
        if self.progress is not None:
            self.progress("compare", self.done, self.total)
        return row


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    if not chosen:
        raise RecipeError("there is no seed", hint="seeds=3")
    if len(chosen) > 1:
        require_scipy()
    return chosen


def _require_training_data(data: Data | None) -> None:
    if data is None:
        raise RecipeError("recovery needs training data", hint="pass data")
    require_reiterable(data, "it is read once for every recovery")


def _scoring_batches(data: Data | None, calibration: Data | None, limit: int) -> list[Batch]:
    """The scoring samples, held in memory: every criterion gets the very same objects in the same order."""
    if calibration is not None:
        batches = list(calibration)
    elif data is not None:
        if limit < 1:
            raise RecipeError(f"calibration_batches is {limit}", hint="give at least 1")
        require_reiterable(data, "it serves for scores and for recovery")
        batches = list(islice(iter(data), limit))
    else:
        batches = []
    if not batches:
        raise InputError("there is no batch to score with", hint="pass data, or calibration")
    return batches


def _builder(models: Models, seeds: Sequence[int]) -> Callable[[int], nn.Module]:
    if isinstance(models, nn.Module):
        return lambda _: models
    if isinstance(models, Mapping):
        known: Mapping[int, nn.Module] = models
        missing = [seed for seed in seeds if seed not in known]
        if missing:
            raise RecipeError(f"there is no model for seed {missing[0]}", hint=f"models are for {sorted(known)}")
        return known.__getitem__
    if isinstance(models, Sequence):
        if len(models) != len(seeds):
            raise RecipeError(f"there are {len(models)} models and {len(seeds)} seeds", hint="give one per seed")
        return dict(zip(seeds, models, strict=True)).__getitem__
    return models


def _metric(wanted: str | None, measured: Mapping[str, float]) -> str:
    if not measured:
        raise InputError("evaluate(model) names no quality", hint="return a number, or a mapping of numbers")
    if wanted is None:
        return next(iter(measured))
    if wanted not in measured:
        raise RecipeError(f"evaluate(model) has no {wanted!r}", hint=f"it has: {', '.join(measured)}")
    return wanted


def _manifest(
    protocol: Protocol,
    entries: Sequence[Entry],
    batches: Sequence[Batch],
    rows: Sequence[Mapping[str, Any]],
    model: nn.Module,
    *,
    title: str,
    command: str,
) -> dict[str, Any]:
    return {
        "schema": 1,
        "title": title or type(model).__name__,
        "command": command,
        "model": type(model).__name__,
        "protocol": asdict(protocol),
        "criteria": [{"label": entry.label, "control": entry.control, **entry.identity} for entry in entries],
        "scoring": {
            "batches": len(batches),
            "samples": sum(batch_size_of(to_example(batch)) for batch in batches),
            "hash": hash_batches(batches),
        },
        "bases": {str(row["seed"]): row["base"] for row in rows},
        "runs": {"total": len(rows), "ok": sum(row["status"] == "ok" for row in rows)},
        "environment": environment(device=str(device_of(model)), seed=protocol.seeds[0]).model_dump(mode="json"),
    }
