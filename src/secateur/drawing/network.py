"""The picture of a network: one row for each part, as wide as it is, with lanes that show what hangs together.

It is a list of rows that open, and not one large drawing: letters keep their size on a telephone, screen readers and
keyboards have what they need, and a page without any script shows all of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from secateur.drawing.svg import element, joined, share

LANES = 7  # side by side; a telephone has room for no more
LANE = 12  # pixels
MIDDLE = 21.0  # of a row's first line, where a lane meets its part
FOLDED = 48  # parts; of more, those that differ in a number of their name alone share a row


@dataclass(frozen=True)
class DrawnPart:
    """One part of a network with weights of its own.

    Args:
        name: of the module.
        kind: its class.
        width: outputs as it came.
        kept: share of them that stays, in [0, 1]; None where nothing was decided.
        after: outputs that stay, None where nothing was decided.
        makes: groups whose units its outputs are.
        reads: groups whose units it reads.
        locked: why its outputs may not go, "" where they may.
        said: lines that are shown when its row is opened.
    """

    name: str
    kind: str
    width: int
    kept: float | None = None
    after: int | None = None
    makes: Sequence[str] = ()
    reads: Sequence[str] = ()
    locked: str = ""
    said: Sequence[str] = ()

    @property
    def state(self) -> str:
        """One word for what happens to it: "gone", "smaller", "whole", "locked" or "free"."""
        if self.after == 0:
            return "gone"
        if self.kept is not None and self.kept < 1:
            return "smaller"
        return "locked" if self.locked else "free" if self.kept is None else "whole"


@dataclass(frozen=True)
class NetworkRow:
    """Parts that share a row, and the lanes that it meets."""

    parts: tuple[DrawnPart, ...]

    @property
    def name(self) -> str:
        """Of the part, or of all with a star for the number that differs."""
        return self.parts[0].name if len(self.parts) == 1 else _pattern(self.parts[0].name)

    @property
    def makes(self) -> set[str]:
        """Groups of the outputs of its parts."""
        return {name for part in self.parts for name in part.makes}

    @property
    def meets(self) -> set[str]:
        """Groups of outputs and inputs of its parts."""
        return self.makes | {name for part in self.parts for name in part.reads}


@dataclass(frozen=True)
class Lane:
    """A line beside the rows: one group that several of them meet, or all groups that the same rows meet alike.

    Args:
        groups: their names.
        number: from the left.
        first, last: the first and the last row.
        makers, readers: numbers of the rows that make the units, and of those that read them.
    """

    groups: tuple[str, ...]
    number: int
    first: int
    last: int
    makers: frozenset[int]
    readers: frozenset[int]

    @property
    def colour(self) -> str:
        """Class of the style sheet: neighbours differ."""
        return f"l{(self.number + self.first) % 6}"


def picture(parts: Sequence[DrawnPart], *, decided: bool = True) -> Markup:
    """Draw a network from its first part to its last.

    Args:
        parts: in the order in which the model defines them.
        decided: whether something was removed, or only may be.

    Returns:
        A list with a legend; nothing without parts.
    """
    if not parts:
        return Markup("")
    rows = folded(parts)
    lanes, left = lanes_of(rows)
    widest = max(part.width for part in parts)
    drawn = [_row(place, row, lanes, widest) for place, row in enumerate(rows)]
    wide = LANE * (1 + max((lane.number for lane in lanes), default=-1))
    aside = [_note(f"{left} more couplings have no line here; rows name them when they are opened.")] if left else []
    if len(rows) < len(parts):
        aside.append(_note(f"{len(parts)} parts in {len(rows)} rows: parts of repeated blocks stand side by side."))
    legend = _legend(decided=decided, lanes=bool(lanes))
    return joined([legend, element("ol", *drawn, class_="network", style=f"--lanes:{wide + 4}px"), *aside])


def folded(parts: Sequence[DrawnPart], most: int = FOLDED) -> list[NetworkRow]:
    """Rows of parts: one each, or one for all parts of repeated blocks where there are many.

    Example:
        >>> many = [DrawnPart(f"block.{i}.{name}", "Linear", 8) for i in range(30) for name in ("up", "down")]
        >>> [(row.name, len(row.parts)) for row in folded(many)]
        [('block.*.up', 30), ('block.*.down', 30)]
    """
    if len(parts) <= most:
        return [NetworkRow((part,)) for part in parts]
    families: dict[tuple[str, str], list[DrawnPart]] = {}
    for part in parts:
        families.setdefault((_pattern(part.name), part.kind), []).append(part)
    return [NetworkRow(tuple(family)) for family in families.values()]


def lanes_of(rows: Sequence[NetworkRow]) -> tuple[list[Lane], int]:
    """A lane for each group that several rows meet, as few side by side as can be, and how many found no place.

    Groups that meet the same rows alike share one: those of repeated blocks, once their parts share rows.
    """
    makers: dict[str, set[int]] = {}
    meeting: dict[str, set[int]] = {}
    for place, row in enumerate(rows):
        for group in row.meets:
            meeting.setdefault(group, set()).add(place)
        for group in row.makes:
            makers.setdefault(group, set()).add(place)
    alike: dict[tuple[frozenset[int], frozenset[int]], list[str]] = {}
    for group, places in meeting.items():
        if len(places) > 1:
            made = frozenset(makers.get(group, ()))
            alike.setdefault((made, frozenset(places) - made), []).append(group)
    found: list[Lane] = []
    taken: list[int] = []  # the last row of each lane
    left = 0
    for (made, read), groups in sorted(alike.items(), key=lambda item: (min(item[0][0] | item[0][1]), item[1])):
        first, last = min(made | read), max(made | read)
        number = next((n for n, end in enumerate(taken) if end < first), len(taken))
        if number >= LANES:
            left += 1
            continue
        taken[number : number + 1] = [last]
        found.append(Lane(tuple(sorted(groups)), number, first, last, made, read))
    return found, left


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _row(place: int, row: NetworkRow, lanes: Sequence[Lane], widest: int) -> Markup:
    first = row.parts[0]
    met = " ".join(str(n) for n, lane in enumerate(lanes) if place in lane.makers | lane.readers)
    states = {part.state for part in row.parts}
    state = next(word for word in ("smaller", "gone", "whole", "free", "locked") if word in states)
    head = element(
        "summary",
        element("span", row.name, class_="name"),
        element("span", first.kind + (f", {len(row.parts)} times" if len(row.parts) > 1 else ""), class_="kind"),
        _bar(first, widest) if len(row.parts) == 1 else _columns(row.parts),
        element("span", _numbers(row.parts), class_="numbers"),
        element("span", _word(row.parts), class_=f"state {state}"),
    )
    said = [element("li", line) for line in _said(row)]
    opened = element("details", head, element("ul", *said)) if said else element("div", head, class_="details")
    return element("li", _lanes(place, row, lanes), opened, data_groups=met or None)


def _said(row: NetworkRow) -> Iterable[str]:
    if len(row.parts) == 1:
        return row.parts[0].said
    return [f"{part.name}: {_numbers([part])}, {_word([part])}" for part in row.parts]


def _numbers(parts: Sequence[DrawnPart]) -> str:
    """Widths before and after; of several parts the ends of their ranges."""
    before, after = [part.width for part in parts], [part.after for part in parts if part.after is not None]
    if not after or after == before:
        return _range(before)
    return f"{_range(before)} → {_range(after)}"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _word(parts: Sequence[DrawnPart]) -> str:
    states = [part.state for part in parts]
    if len(set(states)) > 1:
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        return ", ".join(f"{number} {state}" for state, number in counts.items())
    if states[0] == "smaller":
        lost = 1 - sum(part.kept or 0.0 for part in parts) / len(parts)
        return f"-{100 * lost:.0f} %" if lost >= 0.005 else "-<1 %"
    return {"free": "can be cut"}.get(states[0], states[0])


def _bar(part: DrawnPart, widest: int) -> Markup:
    # Roots: of widths from 3 to 50,000 the small ones would vanish. The filled part of an outline is not distorted.
    length = max(math.sqrt(part.width / max(widest, 1)), 0.012)
    kept = 1.0 if part.kept is None else part.kept
    outline = {"x": share((1 - length) / 2), "width": share(length)}
    inner = {"x": share((1 - length * kept) / 2), "width": share(length * kept)}
    return element(
        "svg",
        element("rect", y=1, height=14, class_=f"outline {part.state}", **outline),
        *([element("rect", y=1, height=14, class_=f"stays {part.state}", **inner)] if kept else []),
        class_="bar", width="100%", height=16, aria_hidden="true",
    )  # fmt: skip


def _columns(parts: Sequence[DrawnPart]) -> Markup:
    """Parts of one row side by side, each as tall as its width is beside that of the widest among them."""
    wide, widest = 1 / len(parts), max(part.width for part in parts)
    found = []
    for place, part in enumerate(parts):
        tall = 26 * max(part.width / max(widest, 1), 0.05)
        full = tall * (1.0 if part.kept is None else part.kept)
        kept = {"x": share((place + 0.06) * wide), "width": share(0.88 * wide)}
        tip = f"{part.name}: {_numbers([part])}, {_word([part])}"
        found.append(element("rect", y=27 - tall, height=tall, class_=f"outline {part.state}", data_tip=tip, **kept))
        if full:
            found.append(element("rect", y=27 - full, height=full, class_=f"stays {part.state}", data_tip=tip, **kept))
    return element("svg", *found, class_="bar", width="100%", height=28, aria_hidden="true")


def _lanes(place: int, row: NetworkRow, lanes: Sequence[Lane]) -> Markup:
    found = []
    for group, lane in enumerate(lanes):
        if not lane.first <= place <= lane.last:
            continue
        x, kind = lane.number * LANE + LANE / 2, f"lane {lane.colour}"
        ends = {"y1": MIDDLE if place == lane.first else 0, "y2": MIDDLE if place == lane.last else "100%"}
        found.append(element("line", x1=x, x2=x, class_=kind, data_group=str(group), **ends))
        if place in lane.makers | lane.readers:
            word = "makes" if place in lane.makers else "reads"
            more = f" and {len(lane.groups) - 1} alike" if len(lane.groups) > 1 else ""
            tip = f"{row.name} {word} {lane.groups[0]}{more}"
            dot = {"cx": x, "cy": MIDDLE, "r": 4}
            found.append(element("circle", class_=f"{kind} {word}", data_group=str(group), data_tip=tip, **dot))
    return element("svg", *found, class_="lanes", aria_hidden="true")


def _note(text: str) -> Markup:
    return element("p", text, class_="soft")


def _legend(*, decided: bool, lanes: bool) -> Markup:
    def sample(kind: str, words: str) -> Markup:
        drawn = [element("rect", x=1, y=1, width=22, height=10, class_=f"outline {kind}")]
        if kind != "gone":
            inner = 11 if kind == "smaller" else 22
            drawn.append(element("rect", x=1 + (22 - inner) / 2, y=1, width=inner, height=10, class_=f"stays {kind}"))
        return element("li", element("svg", *drawn, width=24, height=12, aria_hidden="true"), " ", words)

    def dot(kind: str, words: str) -> Markup:
        drawn = element("circle", cx=6, cy=6, r=4, class_=f"lane l0 {kind}")
        return element("li", element("svg", drawn, width=12, height=12, aria_hidden="true"), " ", words)

    rows = (
        [sample("smaller", "outline: before, filled: what stays"), sample("whole", "nothing went")]
        if decided
        else [sample("free", "can be cut")]
    )
    rows += [sample("gone", "gone")] if decided else [sample("locked", "locked")]
    if lanes:
        rows += [dot("makes", "makes what the line stands for"), dot("reads", "reads it: both are cut together")]
    return element("ul", *rows, class_="legend")
