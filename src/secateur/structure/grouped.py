"""Many conditions as a person reads them: those of one kind together, each line of the code once; none is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from secateur.types import Condition

FEW = 12  # conditions that need no order
OTHERS = "what the data and the sizes decide, and the rest"
# Heading, what stands in the text of such a condition, and the words around it that the heading says once for all.
KINDS = (
    ("arguments at their defaults", r"^holds for (?P<what>.*), its default(?:, by which the code decides)?$"),
    ("arguments at their defaults", r"^holds with defaults for (?P<what>.*)$"),
    ("arguments as the example gives them", r"^holds for (?P<what>.*(?: given as |\*\*kwargs).*), by which the .*$"),
    ("arguments as the example gives them", r"^holds for (?P<what>.*), which the example gives$"),
    ("settings, by which the code decides", r"^holds with (?P<what>.*), by which it decides$"),
    ("what is asked of the surroundings", r"^holds for (?P<what>.*) as it was here, which is asked of the sur.*$"),
)
WAYS = "decisions that go as on the example; the other ways were not seen"
ONE = re.compile(
    r"^holds where (?P<what>.*?)(?:, as on the example)?; the other(?:s| way) (?:was|were) not seen(?: there)?$"
)
LIST = re.compile(
    r"^holds where \d+ (?:more )?decisions of (?P<file>.+) go as on the example: lines (?P<lines>[\d, ]+);"
)
MORE = re.compile(r"; (\d+) more such lines are left out$")


def grouped(conditions: Sequence[Condition]) -> list[str]:
    """Lines that say all conditions: as they are where they are few, else under headings."""
    if len(conditions) <= FEW:
        return [str(condition) for condition in conditions]
    parts: dict[str, dict[str, list[str]]] = {heading: {} for heading in (OTHERS, *(kind[0] for kind in KINDS), WAYS)}
    for condition in conditions:
        heading, what, places = _sorted(condition)
        parts[heading].setdefault(what, []).extend(places)
    lines = [f"{len(conditions)} in all"]
    for heading, found in parts.items():
        if found:
            write = _way if heading == WAYS else _said
            lines += [heading, *(f"  {write(what, places)}" for what, places in found.items())]
    return lines


def _sorted(condition: Condition) -> tuple[str, str, list[str]]:
    """Heading, what is said, and where."""
    text, where = condition.text, [condition.where] if condition.where else []
    listed, one = LIST.match(text), ONE.match(text)
    if listed is not None:
        return WAYS, listed["file"], [f"lines {listed['lines']}"]
    if one is not None:
        name, _, line = condition.where.rpartition(":")
        return WAYS, name or "elsewhere", [f"{one['what']} ({line})" if line else one["what"]]
    more = MORE.search(text)
    text = text if more is None else text[: more.start()]
    where += [] if more is None else [f"{more[1]} more"]
    for heading, pattern in KINDS:
        found = re.match(pattern, text)
        if found is not None:
            return heading, found["what"], where
    return OTHERS, text, where


def _way(name: str, decisions: Iterable[str]) -> str:
    return f"{name}: {'; '.join(decisions)}"


def _said(what: str, places: Sequence[str]) -> str:
    return f"{what} ({', '.join(_places(places))})" if places else what


def _places(places: Sequence[str]) -> Iterator[str]:
    """Lines of one file behind its name."""
    files: dict[str, list[str]] = {}
    for place in places:
        name, _, line = place.rpartition(":")
        files.setdefault(name, []).append(line)
    for name, lines in files.items():
        yield f"{name}:{', '.join(lines)}" if name else ", ".join(lines)
