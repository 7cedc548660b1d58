"""What a search for tickets found: rows, a table with intervals, a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TypedDict

from secateur.comparison.significance import require_scipy
from secateur.errors import InputError
from secateur.files.atomic import atomic_write
from secateur.tickets.plot import Line, plot

DENSE, TICKET = "dense", "ticket"
CONTROLS = {
    "reinit": "the same mask, other initial weights",
    "random": "as many weights drawn from all layers, the same initial weights",
    "shuffled": "as many weights of each layer at other places, the same initial weights",
}


class Row(TypedDict):
    """One network that was trained."""

    key: str
    seed: int
    variant: str
    round: int
    sparsity: float
    kept: int
    total: int
    figures: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class TicketCell:
    """A mean over seeds.

    Args:
        mean: of the figure.
        half: half-width of the 95 % interval of the mean (Student's t); None with one seed.
        seeds: how many.
    """

    mean: float
    half: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.half is None else f"{self.mean:.4f} ± {self.half:.4f}"


@dataclass(frozen=True, eq=False)
class Tickets:
    """All networks of a search.

    Args:
        rows: one for each, in the order in which they were asked for.
        folder: where they are kept.
        config: what decided about them.
    """

    rows: tuple[Row, ...]
    folder: Path
    config: Mapping[str, object]

    @property
    def figure(self) -> str:
        """The figure of quality that the table shows."""
        return next(iter(self.rows[0]["figures"]))

    def cells(self, figure: str | None = None) -> dict[tuple[str, float], TicketCell]:
        """(variant, sparsity) -> mean and interval over the seeds."""
        name = self.figure if figure is None else figure
        values: dict[tuple[str, float], list[float]] = {}
        for row in self.rows:
            values.setdefault((row["variant"], round(row["sparsity"], 6)), []).append(row["figures"][name])
        return {key: _cell(found) for key, found in values.items()}

    def table(self, figure: str | None = None) -> str:
        """Markdown: one row per sparsity, one column per variant; mean and 95 % interval over the seeds."""
        cells = self.cells(figure)
        variants = [v for v in (TICKET, *CONTROLS) if any(key[0] == v for key in cells)]
        dense = next(cell for (variant, _), cell in cells.items() if variant == DENSE)
        lines = [f"| sparsity | {' | '.join(variants)} |", "|---" * (len(variants) + 1) + "|"]
        lines.append(f"| 0 (dense) | {dense} |" + " |" * (len(variants) - 1))
        for level in sorted({level for variant, level in cells if variant != DENSE}):
            shown = [str(cells.get((variant, level), "")) for variant in variants]
            lines.append(f"| {level:.4f} | {' | '.join(shown)} |")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """One line per network."""
        out = io.StringIO()
        names = sorted({name for row in self.rows for name in row["figures"]})
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["seed", "variant", "round", "sparsity", "kept", "total", *names, "seconds", "key"])
        for row in self.rows:
            figures = [row["figures"].get(name, "") for name in names]
            first = (row["seed"], row["variant"], row["round"], row["sparsity"], row["kept"], row["total"])
            writer.writerow([*first, *figures, row["seconds"], row["key"]])
        return out.getvalue()

    def svg(self, figure: str | None = None) -> str:
        """The plot: sparsity against the figure, with intervals."""
        name = self.figure if figure is None else figure
        cells = self.cells(name)
        dense = next(cell for (variant, _), cell in cells.items() if variant == DENSE)
        lines = []
        for variant in (TICKET, *CONTROLS):
            points = sorted((level, cell.mean, cell.half) for (v, level), cell in cells.items() if v == variant)
            if points:
                lines.append(Line(variant, points))
        return plot(lines, level=dense.mean, band=dense.half, level_name="dense", y=name)

    def write(self) -> None:
        """Write rows.csv, table.md and plot.svg into the folder."""
        atomic_write(self.folder / "rows.csv", self.csv())
        atomic_write(self.folder / "table.md", self.table())
        atomic_write(self.folder / "plot.svg", self.svg())

    def row(self, variant: str = TICKET, *, seed: int, round: int) -> Row:
        """One network.

        Raises:
            InputError: there is none such.
        """
        for row in self.rows:
            if (row["variant"], row["seed"], row["round"]) == (variant, seed, round):
                return row
        raise InputError(f"there is no {variant} of seed {seed} in round {round}")


def _cell(values: Sequence[float]) -> TicketCell:
    if len(values) < 2:
        return TicketCell(values[0], None, 1)
    t = float(require_scipy().t.ppf(0.975, len(values) - 1))
    return TicketCell(fmean(values), t * stdev(values) / math.sqrt(len(values)), len(values))
