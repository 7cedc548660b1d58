"""``secateur resume``: a run that was interrupted, killed or crashed goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options

EXAMPLES = ("resume runs/mine",)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of the run that was interrupted.")],
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Go on with an interrupted `prune`, and end with the same result as without the interrupt."""
    from secateur.cli import job as jobs
    from secateur.cli.progress import Stages
    from secateur.cli.prune import command_line, finish
    from secateur.cli.sample import with_sample
    from secateur.errors import RecipeError
    from secateur.files import seed_everything
    from secateur.interrupted import find
    from secateur.interrupted import resume as go_on
    from secateur.recipe import load_recipe

    known = find(folder)
    if not known.words:
        raise RecipeError(
            f"{known.folder} is a run of Python's", hint="go on with it by secateur.resume(folder, model)"
        )
    words, settings = known.words, load_recipe(known.recipe)
    out = Path(words["out"])
    jobs.require_free(out, force=words["force"])
    jobs.use_threads(words["threads"])
    command = command_line(
        words["model"], words["data"], settings, out, words.get("device"), metric=words.get("metric")
    )
    # Seeded as the command was: networks and splits that are made here must be those of the run.
    with seed_everything(settings.seed):
        text = settings.calibration.model_dump()
        device, metric = words.get("device"), words.get("metric")
        work = jobs.resolve(words["model"], words["data"], seed=settings.seed, text=text, device=device, metric=metric)
        with Stages() as stages:
            result = go_on(
                known.folder, work.model, work.example, data=work.data, evaluate=work.metric, progress=stages,
                title=words["model"], command=command,
            )  # fmt: skip
        result = with_sample(work, result)
    result.save(out, force=words["force"])
    return finish(result, out, as_json=json)
