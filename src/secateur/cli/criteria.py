"""``secateur criteria list``: the rules that say what matters least."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli import options
from secateur.cli.console import emit, out, table, write
from secateur.cli.typed import Command

app = typer.Typer(help="The rules that say what matters least.", add_completion=False)


@app.callback()
def _root() -> None:
    """The rules that say what matters least."""


@app.command("list", cls=Command, epilog=options.help_of("criteria list", "criteria list --json"))
def list_(json: options.Json = False, verbose: options.Verbose = False) -> int:
    """List all criteria with what they need, what they score and where they come from."""
    from secateur.criteria.docstrings import first_sentence

    found = [_facts(name) for name in _names()]
    if json:
        emit({"schema": 1, "criteria": found})
        return 0
    if out().is_terminal:
        # Eight columns do not fit a terminal; the rest of a criterion is what `criteria show` is for.
        short = [(f["name"], ", ".join(f["needs"]) or "nothing", f["summary"]) for f in found]
        table(("name", "needs", "idea"), short)
        write("`secateur criteria show NAME` tells the rest; weights need nothing but the model\n")
        return 0
    rows = [
        (
            f["name"],
            f["summary"],
            ", ".join(f["needs"]) or "nothing",
            ", ".join(f["granularities"]),
            first_sentence(f["cost"]),
            f["speed"],
            f["best_for"],
            f["source"],
        )
        for f in found
    ]
    table(("name", "idea", "needs", "scores", "cost", "speed", "best for", "source"), rows)
    return 0


@app.command("show", cls=Command, epilog=options.help_of("criteria show taylor"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A criterion, as criteria list names it.")],
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Show one criterion: its idea, what it needs and scores, options, cost and source."""
    found = _facts(name)
    if json:
        emit({"schema": 1, **found})
        return 0
    for key, value in found.items():
        listed = ", ".join(map(str, value)) if isinstance(value, list) else value
        said = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else listed
        write(f"{key.replace('_', ' ')}: {said or 'nothing'}\n")
    return 0


def _names() -> list[str]:
    from secateur import criteria

    return criteria.names()


def _facts(name: str) -> dict[str, Any]:
    from secateur import criteria
    from secateur.criteria.docstrings import section

    rule = criteria.get(name)
    return {
        "name": rule.name,
        "summary": rule.summary,
        "needs": sorted(rule.needs),
        "granularities": list(rule.granularities),
        "options": rule.options(),
        "cost": section(type(rule), "Cost"),
        "speed": rule.speed,
        "best_for": rule.best_for,
        "source": section(type(rule), "Source"),
    }
