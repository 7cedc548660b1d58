"""``secateur demo --llm``: a real language model loses half of its weights in one shot, and is loaded again."""

from __future__ import annotations

import json as json_
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.cli.console import say, write
from secateur.cli.decisions import OPTIONS
from secateur.errors import CertificateError, RecipeError, SecateurError

if TYPE_CHECKING:
    from secateur.cli.decisions import Decisions
    from secateur.cli.job import Job
    from secateur.recipe import Recipe

MODEL, DATA, RECIPE = "demo:smollm2", "demo:prose", "language-model"
# Of the options of `demo`; the others belong to the demo that trains.
READS = (*OPTIONS, "llm", "out", "set_", "seed", "threads", "force", "dry_run")
WHY = "with --llm half of the weights go in one shot, and nothing is trained or tried several times"
# A quarter of the length and half as many as the recipe takes: a few minutes, and a higher perplexity.
SHORT = (
    "calibration.tokens=256", "calibration.sequences=16", "calibration.batch=4", "calibration.test=8",
    "measure.latency=false",
)  # fmt: skip
# The fresh process adds up the same numbers in the same order, on another count of threads at most.
TOLERANCE = 1e-4


def demo_llm(
    decided: Decisions,
    *,
    out: Path,
    changes: list[str],
    seed: int | None,
    threads: int | None,
    force: bool,
    dry_run: bool,
    json: bool,
) -> int:
    """Prune SmolLM2-135M block by block; what the options mean stands at `secateur.cli.demo.demo`."""
    from secateur.cli import job as jobs
    from secateur.cli.prune import finish, run, save, say_forecast, show_plan
    from secateur.cli.sample import with_sample
    from secateur.files import seed_everything
    from secateur.planning.build import is_structured
    from secateur.recipe.overrides import setting_of

    usual = [setting_of(one, usual=True) for one in SHORT]
    settings = jobs.read_recipe(RECIPE, [*usual, *changes], seed, decided)
    if is_structured(settings.model_dump(by_alias=True)["granularity"]):
        raise RecipeError(
            f"--llm writes zeros, and granularity {settings.granularity!r} is cut.",
            hint="element or 2:4; narrower language models: secateur prune demo:smollm2 --recipe language-model-width",
        )
    jobs.require_free(out, force=force)
    jobs.use_threads(threads)
    with seed_everything(settings.seed):
        say(f"loading {MODEL}")
        text = settings.calibration.model_dump()
        work = jobs.resolve(MODEL, DATA, seed=settings.seed, text=text, device=decided.device)
        say_forecast(work, settings)
        if dry_run:
            return show_plan(work, settings, as_json=json)
        again = ["secateur", "demo", "--llm", *decided.words(), "--seed", str(settings.seed)]
        again += [word for one in changes for word in ("--set", one)]
        result = with_sample(work, run(work, settings, title="demo: SmolLM2-135M", command=shlex.join(again)))
        save(result, out, force=force)
    reloaded = reload(out, work, settings, result.report.after.quality["perplexity"])
    code = finish(result, out, as_json=json, more={"reload": reloaded})
    if not json:
        write(
            f"loaded again in a fresh process by transformers alone: perplexity {reloaded['perplexity']:.2f}\n"
            f"go on with it: secateur measure hf:{out} --task perplexity --data text:FILE\n"
        )
    return code


def reload(folder: Path, work: Job, settings: Recipe, wanted: float) -> dict[str, float]:
    """Measure the folder in a fresh Python process, where transformers loads it as any other.

    Raises:
        CertificateError: its perplexity is not that of the network in memory.
    """
    import torch

    text = settings.calibration
    asked = ["--tokens", str(text.tokens), *([] if text.test is None else ["--sequences", str(text.test)])]
    words = ["measure", f"hf:{folder.absolute()}", "--task", "perplexity", "--data", DATA, *asked,
             "--threads", str(torch.get_num_threads()), "--json"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "secateur.cli", *words], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SecateurError(f"loading {folder} in a fresh process failed", why=done.stderr.strip()[-2000:])
    found = float(json_.loads(done.stdout)["perplexity"])
    if not math.isclose(found, wanted, rel_tol=TOLERANCE):
        raise CertificateError(
            "The model that was saved is not the one that was measured.",
            why=f"perplexity {found} against {wanted} in memory",
            hint="Please report it with the output folder.",
        )
    return {"perplexity": found}
