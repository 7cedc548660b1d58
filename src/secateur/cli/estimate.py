"""``secateur estimate``: what a recipe will bring, before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, table, write
from secateur.cli.decisions import Decisions, decides

if TYPE_CHECKING:
    from torch import nn

    from secateur.deployment import Deployment
    from secateur.report import Report
    from secateur.result import Estimate
    from secateur.types import Example


EXAMPLES = (
    "estimate mynet.py:build --macs 0.5",
    "estimate demo:lenet --params 0.6 --criterion l1",
    "estimate mynet.py:build --granularity 2:4 --deploy bfloat16",
)


@decides(without=("recover",))
def estimate(
    model: options.Model,
    decided: Decisions,
    data: options.Data = None,
    recipe: options.RecipeName = None,
    set_: options.Sets = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    deploy: Annotated[
        Optional[options.Rounding],  # noqa: UP045
        typer.Option("--deploy", help="Also say what `deploy` would bring with weights rounded as far as that."),
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Say what pruning MODEL by a recipe will bring: counts from the plan, latency measured on a copy."""
    from secateur.cli import job as jobs
    from secateur.cli.progress import Stages
    from secateur.files import seed_everything
    from secateur.pipeline import estimate as predict

    settings = jobs.read_recipe(recipe, set_, seed, decided)
    jobs.use_threads(threads)
    with seed_everything(settings.seed):
        text = settings.calibration.model_dump()
        work = jobs.resolve(model, data, seed=settings.seed, text=text, device=decided.device)
        jobs.warn_untrained(work)
        # The word that the user typed says how to give an example; the library could only name an argument.
        example, scoring = work.needed_example(), None if work.data is None else work.data.calibration
        with Stages() as stages:
            told = predict(work.model, example, data=scoring, recipe=settings, progress=stages, title=work.source.name)
        brought = None if deploy is None else deployed(told, work.model, example, deploy)
    if json:
        emit(as_data(told) | ({} if brought is None else {"deployed": _deployed_data(brought)}))
    else:
        _print(told)
        if brought is not None:
            write(f"deployed ({deploy}):\n" + "\n".join(str(brought).splitlines()[len(brought.decisions) :]) + "\n")
    return told.report.exit_code


def deployed(told: Estimate, model: nn.Module, example: Example, weights: options.Rounding) -> Deployment:
    """What `deploy` makes of a copy with the same zeros: its speed depends on where they are, not on their quality."""
    from secateur.deployment import deploy

    # A plan for a model in training mode is deployed as it would be after it.
    return deploy(told.plan.apply(model).eval(), example, weights=weights.value, inplace=True)


def _deployed_data(brought: Deployment) -> dict[str, object]:
    from secateur.cli.deploy import facts

    return facts(brought)


def as_data(told: Estimate) -> dict[str, object]:
    """The estimate for programs."""
    from dataclasses import asdict

    from secateur.report.verdict import speed

    record, said = told.report, speed(told.report)
    return {
        "schema": 1,
        "model": record.title,
        "criterion": record.criterion.name,
        "granularity": record.granularity.name,
        "target": record.target,
        "units": {"removed": record.units.removed, "total": record.units.total, "sparsity": record.sparsity},
        "before": asdict(record.before),
        "predicted": asdict(record.after),
        "plan_cost": dict(told.plan.cost),
        "speed": {"kind": said.kind, "words": said.words, "method": _method(record)},
        "model_sparsity": record.model_sparsity,
        "left_out": [asdict(one) for one in record.left_out],
        "certificate": None if record.certificate is None else asdict(record.certificate),
        "environment": record.environment.model_dump(mode="json"),
    }


def _method(record: Report) -> str:
    if record.applied == "mask":
        return "zeros are stored and multiplied by dense kernels"
    return "both models timed in turns on this machine" if record.after.latency_ms else "not measured"


def _print(told: Estimate) -> None:
    from secateur.report.terminal import sparsity_lines
    from secateur.report.verdict import rows, speed

    record, units = told.report, told.report.units
    title = f"{record.title}: {units.removed} of {units.total} {units.what} would go ({record.sparsity:.1%})"
    table(("", "now", "then", "change"), [(r.label, r.before, r.after, r.change) for r in rows(record)], title=title)
    counted = "counted by the plan, equal on the applied copy" if told.plan.cost else "counted on a copy"
    lines = [f"parameters and MACs: {counted}", f"speed: {speed(record).words} ({_method(record)})"]
    if record.certificate is not None:
        lines.append(f"the cut was proved: largest error {record.certificate.max_abs_error:.1e}")
    lines += sparsity_lines(record)
    lines.append("quality: not predicted; nothing was changed, recovered or written")
    write("\n".join(lines) + "\n")
