"""``secateur reload-check``: what the demo runs in a fresh process, to see that the folder holds everything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import options
from secateur.cli.console import emit

if TYPE_CHECKING:
    from torch import nn

    from secateur.cli.job import Job


def reload_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    model: Annotated[str, typer.Option("--model", metavar="MODEL")],
    data: options.Data = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Load DIR and print its outputs on the example and its quality, as JSON."""
    from secateur.cli import job as jobs
    from secateur.cli.measure import load

    jobs.use_threads(threads)
    work, network = load(str(folder), model, data, seed=0)
    emit(facts(work, network))
    return 0


def facts(work: Job, network: nn.Module) -> dict[str, object]:
    """Outputs on the example and quality: what two processes must agree on."""
    from secateur.model.call import call, outputs
    from secateur.model.guard import evaluating

    with evaluating(network):
        found = outputs(call(network, work.needed_example()))
    return {
        "outputs": [[float(value) for value in tensor.double().flatten()] for tensor in found],
        "quality": {} if work.judged.evaluate is None else work.judged.evaluate(network),
    }
