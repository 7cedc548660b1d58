"""A plot of sparsity against a figure, as one SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = ("#3f86cc", "#d98324", "#7a9a3a", "#9a5fb0")
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 120, 20, 50


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: in the legend.
        points: (sparsity, value, half-width of its interval or None).
    """

    name: str
    points: Sequence[tuple[float, float, float | None]]


def plot(lines: Sequence[Line], *, level: float, band: float | None, level_name: str, y: str) -> str:
    """Draw curves over the share of weights that is left, which halves from tick to tick.

    Args:
        lines: at most four.
        level: a horizontal line, the dense network.
        band: half-width of its interval.
        level_name: its name.
        y: name of the figure.
    """
    left = [1 - sparsity for line in lines for sparsity, _, _ in line.points] or [1.0]
    lows = [value - (half or 0) for line in lines for _, value, half in line.points] + [level - (band or 0)]
    highs = [value + (half or 0) for line in lines for _, value, half in line.points] + [level + (band or 0)]
    low, high = min(lows), max(highs)
    low, high = (low - 0.5, high + 0.5) if high == low else (low, high)
    most = max(-math.log2(min(left)), 1.0)

    def across(kept: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * -math.log2(kept) / most

    def down(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = _axes(most, low, high, across, down, y)
    if band:
        parts.append(
            f'<rect x="{_LEFT}" y="{down(level + band):.1f}" width="{_WIDTH - _LEFT - _RIGHT}" '
            f'height="{max(down(level - band) - down(level + band), 0):.1f}" fill="#9aa1ab" opacity="0.25"/>'
        )
    right = _WIDTH - _RIGHT
    parts.append(f'<path d="M{_LEFT} {down(level):.1f}H{right}" stroke="#9aa1ab" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{right + 6}" y="{down(level) + 4:.1f}">{escape(level_name)}</text>')
    for number, line in enumerate(lines):
        parts += _curve(line, _COLOURS[number % len(_COLOURS)], across, down)
        colour, place = _COLOURS[number % len(_COLOURS)], _HEIGHT - _BOTTOM - 16 * (len(lines) - number)
        parts.append(f'<text x="{right + 6}" y="{place}" fill="{colour}">{escape(line.name)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#444">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _axes(most: float, low: float, high: float, across: object, down: object, y: str) -> list[str]:
    assert callable(across)
    assert callable(down)
    bottom = _HEIGHT - _BOTTOM
    parts = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}" fill="none" stroke="#444"/>']
    for power in range(math.floor(most) + 1):
        x = across(2.0**-power)
        parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#444"/>')
        text = f"{100 * 2.0**-power:.3g}"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    for number in range(5):
        value = low + (high - low) * number / 4
        parts.append(f'<path d="M{_LEFT - 5} {down(value):.1f}h5" stroke="#444"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{down(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">% of the weights left</text>')
    turned = f"rotate(-90 16 {_HEIGHT / 2})"
    parts.append(f'<text x="16" y="{_HEIGHT / 2}" text-anchor="middle" transform="{turned}">{escape(y)}</text>')
    return parts


def _curve(line: Line, colour: str, across: object, down: object) -> list[str]:
    assert callable(across)
    assert callable(down)
    places = [(across(1 - sparsity), down(value)) for sparsity, value, _ in line.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for (x, y), (_, value, half) in zip(places, line.points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        if half:
            top, end = down(value + half), down(value - half)
            parts.append(f'<path d="M{x:.1f} {top:.1f}V{end:.1f}" stroke="{colour}"/>')
    return parts
