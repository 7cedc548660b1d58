"""What a search leaves in its folder: the front as a page and as data, and the recipes of its trials."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from secateur.drawing import environment_of_pages, page_parts
from secateur.files.atomic import atomic_write
from secateur.files.seeds import canonical_json
from secateur.report.safe_text import clean
from secateur.search.study import SearchResult

_HERE = Path(__file__).parent
LEFT, TOP, WIDE, HIGH = 60, 10, 560, 320  # the frame of a chart


class Tick(TypedDict):
    """A number beside an axis."""

    at: float
    text: str


class Dot(TypedDict):
    """A trial in a chart."""

    number: int
    x: float
    y: float
    front: bool
    words: str
    recipe: str


def write_search(found: SearchResult, folder: Path, *, model: str, data: str) -> dict[str, str]:
    """Write ``front.html``, ``front.json``, ``recommended.yaml`` and ``recipes/``; each file whole or not at all.

    Args:
        found: the results.
        folder: made where it is missing; files of an earlier call are replaced.
        model: the word of the command line, for the commands on the page.
        data: likewise.

    Returns:
        What lies where.
    """
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    for number in (*found.front, found.best):
        atomic_write(folder / "recipes" / f"{number}.yaml", found.recipes[number])
    atomic_write(folder / "recommended.yaml", f"# trial {found.best}: {found.why}\n{found.recipes[found.best]}")
    atomic_write(folder / "front.json", canonical_json(to_data(found)))
    atomic_write(folder / "front.html", to_page(found, folder, model=model, data=data))
    names = {"front": "front.html", "data": "front.json", "recommended": "recommended.yaml", "recipes": "recipes"}
    return {what: str(folder / name) for what, name in names.items()}


def to_data(found: SearchResult) -> dict[str, object]:
    """The results as plain data."""
    trials = [
        {"trial": number, "values": dict(values), "fall": found.falls[number], "front": number in found.front}
        for number, values in found.values.items()
    ]
    return {
        "schema": 1, "objectives": list(found.goals.names), "recommended": found.best, "why": found.why,
        "states": found.states, "trials": trials,
    }  # fmt: skip


def to_page(found: SearchResult, folder: Path, *, model: str, data: str) -> str:
    """The page: charts of the quality against every cost, and the front with its commands. Without any script."""
    filters = {"clean": clean, "lines": lambda text: clean(text, lines=True, limit=20_000)}
    return (
        environment_of_pages(_HERE, filters)
        .get_template("front.html")
        .render(
            title=f"{model}: {', '.join(found.goals.names)}",
            best=found.best,
            why=found.why,
            falls=found.falls,
            states=", ".join(f"{count} trials {state}" for state, count in sorted(found.states.items())),
            charts=[_chart(found, name) for name in found.goals.names[1:]],
            trials=[
                {
                    "number": number,
                    "words": _words(found, number),
                    "fall": found.falls[number],
                    "recipe": found.recipes[number],
                    "command": command_of(found, number, folder, model=model, data=data),
                }
                for number in sorted(found.front, key=lambda one: found.values[one][found.goals.names[-1]])
            ],
            **page_parts(),
        )
    )


def command_of(found: SearchResult, number: int, folder: Path, *, model: str, data: str) -> str:
    """The shell line that prunes by the recipe of a trial."""
    recipe = folder / "recipes" / f"{number}.yaml"
    return shlex.join(
        ["secateur", "prune", model, "--data", data, "--recipe", str(recipe), "--out", f"{folder}-trial-{number}"]
    )


def _words(found: SearchResult, number: int) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.values[number].items())


def _chart(found: SearchResult, cost: str) -> dict[str, object]:
    quality = found.goals.names[0]
    x, y = _Axis([one[cost] for one in found.values.values()]), _Axis([one[quality] for one in found.values.values()])
    dots: list[Dot] = [
        {
            "number": number,
            "x": LEFT + WIDE * x.share(values[cost]),
            "y": TOP + HIGH * (1 - y.share(values[quality])),
            "front": number in found.front, "words": _words(found, number), "recipe": found.recipes[number],
        }
        for number, values in found.values.items()
    ]  # fmt: skip
    return {
        "title": f"{quality} against {cost}",
        "cost": cost,
        # Drawn last, the points of the front lie above the others.
        "dots": sorted(dots, key=lambda dot: (dot["front"], dot["number"] == found.best)),
        "x": [Tick(at=LEFT + WIDE * place, text=f"{x.at(place):.3g}") for place in (0.0, 0.5, 1.0)],
        "y": [Tick(at=TOP + HIGH * (1 - place) + 4, text=f"{y.at(place):.3g}") for place in (0.0, 0.5, 1.0)],
    }


class _Axis:
    """A range of values with some room at both ends."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        self.low, self.high = low - room, high + room

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def at(self, share: float) -> float:
        """The value at a place."""
        return self.low + share * (self.high - self.low)
