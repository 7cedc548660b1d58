"""``secateur lottery``: sparse networks that train from an early state as well as the dense one, and controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import options
from secateur.cli.console import emit, say, write

if TYPE_CHECKING:
    from secateur.recipe import Recipe

EXAMPLES = (
    "lottery demo:lenet --data demo:mnist --out runs/tickets",
    "lottery net.py:build --data npz:my.npz --rewind epoch:1 --out runs/t",
)

# Keys of a recipe; seeds are those of --seeds, from 0. What training and granularity may be is checked below.
READS = ("criterion", "granularity", "scope", "target", "protect", "training", "recover")


def lottery(
    model: options.Model,
    data: Annotated[str, typer.Option("--data", metavar="DATA", help=f"{options.DATA_WORDS}.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the search; what is there is not redone.")
    ],
    recipe: options.RecipeName = None,
    set_: options.Sets = None,
    rate: Annotated[float, typer.Option("--rate", help="Share of the remaining weights that each round masks.")] = 0.2,
    rewind: Annotated[
        str, typer.Option("--rewind", metavar="init|step:N|epoch:N|rates", help="What each round goes back to.")
    ] = "init",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, from 0.")] = 3,
    controls: Annotated[
        str, typer.Option("--controls", metavar="NAMES", help="reinit, random, shuffled; or none.")
    ] = "reinit,random,shuffled",
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Search for lottery tickets: train, prune, rewind, train again; a network is trained only once."""
    import secateur as sc
    from secateur.cli import job as jobs
    from secateur.cli.progress import Stages
    from secateur.files.checkpoint import PAGE
    from secateur.planning.unread import refuse_others
    from secateur.sources import resolve_data, resolve_model

    settings = jobs.read_recipe(recipe or "lottery", set_, None)
    refuse_others(settings, READS, "A search for tickets")
    training = training_of(settings)
    jobs.use_threads(threads)
    say(f"curves while it trains: {out / PAGE}")
    chosen = () if controls == "none" else tuple(name.strip() for name in controls.split(","))
    with Stages() as stages:
        found = sc.lottery(
            lambda seed: resolve_model(model, seed=seed).model,
            resolve_data(data, seed=0),
            folder=out,
            sparsity=sparsity_of(settings),
            rate=rate,
            scope=settings.scope,
            rewind=rewind_of(rewind),
            seeds=range(seeds),
            controls=chosen,
            training=training,
            criterion=settings.model_dump()["criterion"],
            protect=settings.protect,
            name=model,
            progress=stages,
        )
    if json:
        emit({"rows": list(found.rows), "config": dict(found.config), "out": str(out)})
    else:
        write(f"{found.table()}\n{out / 'plot.svg'}\n{out / 'rows.csv'}\n")
    return 0


def training_of(recipe: Recipe) -> dict[str, object]:
    """The one training step of a recipe, as keywords of `secateur.lottery`.

    Raises:
        RecipeError: other steps, or options that belong to the recovery of a trained network.
    """
    from secateur.errors import RecipeError
    from secateur.recipe.schema import Finetune
    from secateur.recover.steps import optimizer_of
    from secateur.tickets.training import Builtin

    steps = recipe.recover
    if recipe.training is not None:
        raise RecipeError("a search for tickets prunes between trainings", hint="leave training out of the recipe")
    if len(steps) != 1 or not isinstance(steps[0], Finetune):
        raise RecipeError("a search for tickets trains by one finetune step", hint="leave one in recover")
    step = steps[0]
    told = step.model_dump(exclude_defaults=True)
    other = sorted(set(told) - {"method", *Builtin.KNOWN})
    if other:
        raise RecipeError(f"recover.0.{other[0]} recovers a trained network, and tickets are trained from the start")
    return {**{key: value for key, value in told.items() if key != "method"}, "optimizer": optimizer_of(step)}


def sparsity_of(recipe: Recipe) -> float:
    """The sparsity of the last round.

    Raises:
        RecipeError: another target, or another granularity than single weights.
    """
    from secateur.errors import RecipeError

    target = recipe.target.given()
    if set(target) != {"sparsity"} or not isinstance(target["sparsity"], float) or recipe.granularity != "element":
        raise RecipeError(
            "tickets are masks of single weights at one sparsity",
            hint="granularity: element, target: {sparsity: 0.9}",
        )
    return target["sparsity"]


def rewind_of(word: str) -> str | dict[str, int]:
    """``init``, ``rates``, ``step:500`` or ``epoch:1``."""
    from secateur.errors import RecipeError

    kind, colon, number = word.partition(":")
    if word in ("init", "rates"):
        return word
    if colon and kind in ("step", "epoch") and number.isdecimal() and len(number) < 10:
        return {kind: int(number)}
    raise RecipeError(f"--rewind {word!r} is not known", hint="init, step:500, epoch:1 or rates")
