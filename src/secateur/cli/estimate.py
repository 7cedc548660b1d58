"""``secateur estimate``: what a recipe will bring, before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.cli import options
from secateur.cli.console import emit, table, write

if TYPE_CHECKING:
    from secateur.cli.job import Job
    from secateur.planning import Plan
    from secateur.recipe import Recipe
    from secateur.report import Record


def estimate(
    model: options.Model,
    data: options.Data = None,
    recipe: options.RecipeName = None,
    set_: options.Sets = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Say what pruning MODEL by a recipe will bring: counts from the plan, latency measured on a copy."""
    from secateur.cli import job as jobs
    from secateur.files import seed_everything

    settings = jobs.read_recipe(recipe, set_, seed)
    jobs.use_threads(threads)
    with seed_everything(settings.seed):
        work = jobs.resolve(model, data, seed=settings.seed)
        jobs.warn_untrained(work)
        record, plan = predict(work, settings)
    if json:
        emit(as_data(record, plan))
    else:
        _print(record, plan)
    return 0


def predict(work: Job, settings: Recipe) -> tuple[Record, Plan]:
    """Plan, apply the plan to a copy in memory, certify it, count and time both; nothing is recovered."""
    from secateur import report
    from secateur.cli.progress import Stages
    from secateur.measure import latency, snapshot
    from secateur.measure.macs import samples_in
    from secateur.model.call import device_of
    from secateur.pipeline import plan_by
    from secateur.request import Target

    example, wanted = work.needed_example(), settings.measure
    with Stages() as stages:
        stages("plan", 0, 0)
        plan = plan_by(work.model, example, settings, None if work.data is None else work.data.calibration)
        stages("apply to a copy", 0, 0)
        smaller = plan.apply(work.model)
        stages("measure", 0, 0)
        timed = (
            latency(
                {"before": work.model, "after": smaller},
                example,
                rounds=wanted.rounds,
                warmup=wanted.warmup,
                threads=wanted.threads,
                batch_size=wanted.batch_size,
            )
            if wanted.latency
            else {}
        )
        samples = samples_in(work.model, example)
        before = snapshot(work.model, example, latency_ms=timed.get("before"), samples=samples)
        after = snapshot(smaller, example, latency_ms=timed.get("after"), samples=samples)
    units, request = plan.units, plan.request
    record = report.build(
        work.source.name,
        before=before,
        after=after,
        applied="mask" if plan.masks else "cut",
        units=report.Units(removed=units["removed"], total=units["total"], what=f"{units['what']} units"),
        criterion=report.Choice(name=request.criterion.name),
        granularity=report.Choice(name=units["what"]),
        scope=settings.scope,
        allocation=report.Choice(name=request.allocation),
        environment=report.environment(device=str(device_of(work.model)), seed=settings.seed),
        fingerprint=plan.fingerprint,
        certificate=plan.certificate,
        certificate_reason="" if plan.certificate else "zeros are written; no slice is cut",
        target=Target.of(settings.target.given()).flat(),
    )
    return record, plan


def as_data(record: Record, plan: Plan) -> dict[str, object]:
    """The estimate for programs."""
    from secateur.report.verdict import speed

    said = speed(record)
    return {
        "schema": 1,
        "model": record.title,
        "criterion": record.criterion.name,
        "granularity": record.granularity.name,
        "target": record.target,
        "units": {"removed": record.units.removed, "total": record.units.total, "sparsity": record.sparsity},
        "before": record.before.model_dump(mode="json"),
        "predicted": record.after.model_dump(mode="json"),
        "plan_cost": dict(plan.cost),
        "speed": {"kind": said.kind, "words": said.words, "method": _method(record)},
        "certificate": None if record.certificate is None else record.certificate.model_dump(mode="json"),
        "environment": record.environment.model_dump(mode="json"),
    }


def _method(record: Record) -> str:
    if record.applied == "mask":
        return "zeros are stored and multiplied by dense kernels"
    return "both models timed in turns on this machine" if record.after.latency_ms else "not measured"


def _print(record: Record, plan: Plan) -> None:
    from secateur.report.verdict import rows, speed

    units = record.units
    title = f"{record.title}: {units.removed} of {units.total} {units.what} would go ({record.sparsity:.1%})"
    table(("", "now", "then", "change"), [(r.label, r.before, r.after, r.change) for r in rows(record)], title=title)
    counted = "counted by the plan, equal on the applied copy" if plan.cost else "counted on a copy"
    lines = [f"parameters and MACs: {counted}", f"speed: {speed(record).words} ({_method(record)})"]
    if record.certificate is not None:
        lines.append(f"cut equals replay: largest error {record.certificate.max_abs_error:.1e}")
    lines.append("quality: not predicted; nothing was changed, recovered or written")
    write("\n".join(lines) + "\n")
