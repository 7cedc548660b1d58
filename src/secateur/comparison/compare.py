"""The fair comparison of criteria on the user's own model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Unpack, cast

from torch import Tensor, nn

from secateur import shown
from secateur.comparison.cells import planned
from secateur.comparison.contestants import Contestant, CriterionChoice, make_contestants
from secateur.comparison.hashes import hash_batches
from secateur.comparison.protocol import SCHEMA, Protocol, ProtocolOptions
from secateur.comparison.publish import publish
from secateur.comparison.records import HeldFixed, Machine, Manifest, Participant, RunRow, ScoreFidelity, Summary
from secateur.comparison.seed_run import Material, SeedRun
from secateur.comparison.significance import require_scipy
from secateur.comparison.store import Store
from secateur.comparison.summary import summarise
from secateur.errors import InputError, RecipeError
from secateur.measure import quality
from secateur.model.admit import admit
from secateur.model.call import as_loss, device_of, require_reiterable, to_example
from secateur.model.samples import batch_size_of, with_batch_size
from secateur.report import environment
from secateur.types import Batch, Data, Evaluate, Example, Loss, Progress

Models = nn.Module | Sequence[nn.Module] | Mapping[int, nn.Module] | Callable[[int], nn.Module]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What a comparison found.

    Args:
        rows: one mapping per run, also of runs that were refused or diverged (``status``, ``why``).
        summary: curves, differences, tests, costs: what the page shows.
        protocol: what was held fixed.
        manifest: protocol, hashes, environment; enough to repeat it.
        out: the folder with results.csv, summary.json, manifest.json, compare.html and compare.md.
        reused: runs whose results were there already.
    """

    rows: tuple[RunRow, ...]
    summary: Summary
    protocol: Protocol
    manifest: Manifest
    out: Path
    reused: int

    def __repr__(self) -> str:
        return shown.line("Comparison", f"{len(self.rows)} runs", f"{self.reused} of them from before", str(self.out))

    def _repr_html_(self) -> str:
        names = ("criterion", "level", "seed", "status", "quality")
        rows = [[str(dict(row).get(name, "")) for name in names] for row in self.rows]
        return shown.table(repr(self)[1:-1], names, rows, notes=[f"curves and tests: {self.out / 'compare.html'}"])


def compare(
    models: Models,
    data: Data | None = None,
    *,
    criteria: Sequence[CriterionChoice],
    evaluate: Evaluate,
    out: str | Path,
    protocol: Protocol | None = None,
    calibration: Data | None = None,
    calibration_batches: int = 8,
    example: Example = None,
    loss: Loss | None = None,
    title: str = "",
    command: str = "",
    progress: Progress | None = None,
    **options: Unpack[ProtocolOptions],
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
        protocol: all that is held fixed, as one object (`Protocol.of`), in place of the options below.
        calibration: batches to score with.
        calibration_batches: batches taken from `data` where `calibration` is left out.
        example: forward inputs; default the first sample of the scoring data.
        loss: ``loss(model, batch) -> scalar``; default from the batches.
        title: what the page calls the comparison.
        command: the command line that repeats it.
        progress: called as ``progress("compare", done, total)`` after every run.
        **options: the protocol in parts, each of which may be left out:

            - granularity: one, as in a recipe; default "channel".
            - levels: fractions removed; default six: geometric in what is left for masks, 20 to 85 % of the
              multiply-accumulates for cuts.
            - match: what levels count: "units" (exact counts), "macs" or "params"; default "auto" is macs for cuts,
              params for experts, units for masks.
            - seeds: how many, or which; default 3. Three cannot separate differences below 2.5 standard deviations.
            - recover: recovery steps as in a recipe, or several named lists of them. Without recovery is always run.
            - recover_levels: levels at which recovery is run; default all.
            - ablation_levels: levels of the shuffled and inverted controls; default the middle one.
            - scratch: steps that train the equal-size network (magnitude's choice) from new weights; default not run.
            - scope: where units compete; default "global".
            - allocation: how a global amount is spread; default "global".
            - protect: names or patterns that stay whole.
            - metric: which quality is compared; default the first that `evaluate` names.
            - maximize: whether higher is better; default by the name: loss, error, perplexity and the like are lower.
            - rounds: timed forward passes of each cut model, in turns with the dense one; default 30, 0 = none.
            - probes: units per seed whose removal alone is measured on the scoring samples, to see what each score
              tells of the loss; one forward pass over them each; default 64, 0 = none.
            - confidence: of intervals; default 0.95; tests are at 1 - confidence.
            - tag: free text that joins the addresses of the results: change it when `evaluate` or `loss` change.

    Returns:
        rows, summary and where the files lie.

    Raises:
        RecipeError: an unknown name, a level out of range, a wrong step, or a protocol and its parts.
        InputError: no data where it is needed.
        UnsupportedError: scipy is missing.
        TypeError: an option that there is not.

    Cost: per seed and criterion one scoring; per level one plan, one evaluation, and each recovery.

    Source: Blalock et al., "What is the State of Neural Network Pruning?", 2020, section 6 (protocol); Frankle et
    al., "Pruning Neural Networks at Initialization", 2021, section 5 (shuffled and inverted scores).
    """
    if protocol is not None and options:
        raise RecipeError(
            f"{sorted(options)[0]} was given beside a protocol", hint="give a protocol, or its parts, not both"
        )
    require_scipy()  # now, and not after hours of runs
    wanted, contestants = protocol or Protocol.of(**options), make_contestants(criteria)
    # Everything that can be refused is refused here: nothing was written or trained yet.
    if wanted.trains:
        _require_training_data(data)
    batches = _scoring_batches(data, calibration, calibration_batches)
    build = _builder(models, wanted.seeds)
    first = build(wanted.seeds[0])
    # The names of the qualities are known when something was measured; nothing is written before that.
    wanted = wanted.measuring(quality(first, evaluate))
    # One sample: MACs and latency are then those of one input, whatever batch was scored with.
    example = with_batch_size(to_example(batches[0]), 1) if example is None else example
    material = Material(batches, data, example, evaluate, as_loss(loss), Store(out))
    count = _Counter(len(planned(wanted, contestants)), progress)
    rows: list[RunRow] = []
    told: list[dict[str, ScoreFidelity]] = []
    for seed in wanted.seeds:
        # The first model was built already, to be measured; a builder may take hours over another.
        base = first if seed == wanted.seeds[0] else build(seed)
        run = SeedRun(wanted, contestants, material, seed=seed, base=base)
        rows += [count(*run.result(cell)) for cell in run.cells()]
        told.append(run.fidelity())  # after the runs: it needs every criterion's scores, which lie in the store now
    summary = summarise(rows, wanted, told, [name for name, _ in first.named_modules()])
    manifest = _manifest(wanted, contestants, batches, rows, first, title=title, command=command)
    publish(material.store.folder, rows, summary, manifest)
    return Comparison(tuple(rows), summary, wanted, manifest, material.store.folder, count.reused)


class _Counter:
    """Counts the runs as they come in, and passes that on."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.done = self.reused = 0

    def __call__(self, row: RunRow, known: bool) -> RunRow:
        self.done, self.reused = self.done + 1, self.reused + known
        if self.progress is not None:
            self.progress("compare", self.done, self.total)
        return row


def _require_training_data(data: Data | None) -> None:
    if data is None:
        raise RecipeError("recovery needs training data", hint="pass data")
    require_reiterable(data, "it is read once for every recovery")


def _scoring_batches(data: Data | None, calibration: Data | None, limit: int) -> list[Batch]:
    """The scoring samples, held in memory: every criterion gets the very same objects in the same order."""
    if calibration is not None:
        batches = list(calibration)  # read once, so a stream will do
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
    # A module first: it may be callable, and even a sequence (nn.Sequential has a length and items).
    if isinstance(models, nn.Module):
        inside = admit(models, copied=True)
        return lambda _: inside
    if isinstance(models, Mapping) and not any(isinstance(value, Tensor) for value in models.values()):
        known: Mapping[int, nn.Module] = models
        missing = [seed for seed in seeds if seed not in known]
        if missing:
            raise RecipeError(f"there is no model for seed {missing[0]}", hint=f"models are for {sorted(known)}")
        return lambda seed: admit(known[seed], copied=True)
    if isinstance(models, Sequence):
        if len(models) != len(seeds):
            raise RecipeError(f"there are {len(models)} models and {len(seeds)} seeds", hint="give one per seed")
        listed = dict(zip(seeds, models, strict=True))
        return lambda seed: admit(listed[seed], copied=True)
    if not callable(models) or isinstance(models, type):
        admit(models)  # says what was given in the place of a model
    build = cast("Callable[[int], nn.Module]", models)  # a function of the seed, called once for each
    return lambda seed: admit(build(seed), copied=True)


def _manifest(
    protocol: Protocol,
    contestants: Sequence[Contestant],
    batches: Sequence[Batch],
    rows: Sequence[RunRow],
    model: nn.Module,
    *,
    title: str,
    command: str,
) -> Manifest:
    machine = environment(device=str(device_of(model)), seed=protocol.seeds[0]).model_dump(mode="json")
    named = [{"label": one.label, "control": one.control, **one.identity} for one in contestants]
    return {
        "schema": SCHEMA,
        "title": title or type(model).__name__,
        "command": command,
        "model": type(model).__name__,
        "protocol": cast(HeldFixed, asdict(protocol)),
        "criteria": cast(list[Participant], named),
        "scoring": {
            "batches": len(batches),
            "samples": sum(batch_size_of(to_example(batch)) for batch in batches),
            "hash": hash_batches(batches),
        },
        # As text, since JSON has no other keys.
        "bases": {str(row["seed"]): row["base"] for row in rows},
        "runs": {"total": len(rows), "ok": sum(row["status"] == "ok" for row in rows)},
        "environment": cast(Machine, machine),
    }
