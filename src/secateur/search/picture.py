"""Curves of many groups as one picture: a table of cells, darker where more is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from secateur.report.safe_text import clean

CELL, HEIGHT, NAME, CHARACTERS = 72, 22, 260, 38


def heat(rows: Mapping[str, Sequence[tuple[float, float]]], title: str) -> str:
    """An SVG of one row per name, each with (ratio, fall) cells.

    Args:
        rows: name -> cells; names may hold anything.
        title: what is shown.
    """
    most = max((fall for cells in rows.values() for _, fall in cells), default=0.0)
    ratios = list(dict.fromkeys(ratio for cells in rows.values() for ratio, _ in cells))
    wide, high = NAME + CELL * len(ratios) + 16, HEIGHT * (len(rows) + 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12"><title>{_text(title, 200)}</title>',
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>',
        f'<text x="8" y="16" font-weight="bold" fill="#1b1f24">{_text(title, 200)}</text>',
    ]
    parts += [
        f'<text x="{NAME + CELL * place + CELL / 2}" y="{2 * HEIGHT - 6}" text-anchor="middle" '
        f'fill="#1b1f24">{ratio:.0%}</text>'
        for place, ratio in enumerate(ratios)
    ]
    for line, (name, cells) in enumerate(rows.items()):
        top = HEIGHT * (line + 2)
        parts.append(
            f'<text x="{NAME - 8}" y="{top + 15}" text-anchor="end" fill="#1b1f24">{_text(name, CHARACTERS)}</text>'
        )
        parts += [_cell(NAME + CELL * ratios.index(ratio), top, fall, most) for ratio, fall in cells]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(left: int, top: int, fall: float, most: float) -> str:
    # By the root: most of what tells groups apart lies far below the largest fall.
    strength = (max(fall, 0.0) / most) ** 0.5 if most > 0 else 0.0
    # From white to a dark red, over which the number is written in what can be read there.
    colour = tuple(round(255 - strength * (255 - end)) for end in (158, 28, 28))
    ink = "#ffffff" if strength > 0.6 else "#1b1f24"
    place = f'x="{left}" y="{top}" width="{CELL - 2}" height="{HEIGHT - 2}"'
    return (
        f'<rect {place} fill="rgb{colour}"/><text x="{left + CELL / 2 - 1}" y="{top + 15}" text-anchor="middle" '
        f'fill="{ink}">{fall:.2f}</text>'
    )


def _text(text: str, limit: int) -> str:
    return escape(clean(text, limit=limit))
