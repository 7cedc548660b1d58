"""``secateur recipes list`` and ``show``: the recipes that come with the package."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.console import emit, table, write
from secateur.cli.decisions import Decisions, decides
from secateur.cli.typed import Command

app = typer.Typer(help="The recipes that come with the package.", add_completion=False)


@app.callback()
def _root() -> None:
    """The recipes that come with the package."""


@app.command("list", cls=Command, epilog=options.help_of("recipes list"))
def list_(json: options.Json = False, verbose: options.Verbose = False) -> int:
    """List the bundled recipes and when to choose them."""
    from secateur.recipe import bundled

    found = {name: _about(name) for name in bundled()}
    if json:
        emit({"schema": 1, "recipes": [{"name": name, "about": about} for name, about in found.items()]})
    else:
        table(("name", "about"), list(found.items()))
    return 0


@app.command("show", cls=Command, epilog=options.help_of("recipes show channel-half-macs --macs 0.6 > mine.yaml"))
@decides(without=("device",))
def show(
    name: Annotated[str, typer.Argument(metavar="FILE|NAME", help="A recipe file, or the name of a bundled one.")],
    decided: Decisions,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Print a recipe with every default filled in."""
    from secateur.recipe import dump_recipe, load_recipe

    recipe = load_recipe(name, [*decided.settings(), *(set_ or ())])
    if json:
        emit(recipe.model_dump(mode="json", by_alias=True, exclude_none=True))
    else:
        write(dump_recipe(recipe))
    return 0


def _about(name: str) -> str:
    text = (resources.files("secateur.recipe") / "bundled" / f"{name}.yaml").read_text("utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)
