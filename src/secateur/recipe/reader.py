"""YAML that may be hostile, read into plain data that remembers its lines.

ruamel.yaml only parses here; nothing is constructed by it. Tags, merge keys and directives are refused, so a
file cannot name a class, and sizes are capped before anything grows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from secateur.errors import RecipeError

MAX_BYTES, MAX_DEPTH, MAX_ALIASES, MAX_NODES = 1_000_000, 20, 50, 10_000
_INT = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0o[0-7_]+|[0-9][0-9_]*)")
_CORE = "tag:yaml.org,2002:"

Path = tuple[str | int, ...]


@dataclass
class RecipeText:
    """Plain data and where each piece of it was written."""

    origin: str
    data: object = None
    lines: dict[Path, int] = field(default_factory=dict)

    def where(self, path: Path) -> str:
        """``file:line`` of a key, or of the nearest key around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return f"{self.origin}:{self.lines[path[:length]]}"
        return self.origin


def read_yaml(text: str, origin: str) -> RecipeText:
    """Parse one YAML document.

    Args:
        text: the document.
        origin: the file's name for messages.

    Returns:
        dicts with text keys, lists, str, int, finite float, bool, None; and lines, counted from 1.

    Raises:
        RecipeError: bad YAML, a tag, directive or merge key, a doubled key, a key that is no text, NaN, or
            more than 1 MB, 20 levels, 50 aliases or 10,000 values (aliases count for what they stand for).
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise RecipeError(f"{origin}: larger than {MAX_BYTES} bytes")
    source = RecipeText(origin)
    try:
        _check_events(text, origin)
        node = _yaml().compose(text)
        if node is not None:
            source.data = _Builder(source).build(node, (), 1)
    except RecipeError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        _refuse(origin, mark.line if mark else None, f"not valid YAML: {error.problem or error.context}")
    except Exception as error:
        # The parser meets hostile text here, and not all that it raises belongs to its own error class.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{origin}: not valid YAML: {reason[:200]!a}") from error
    return source


def read_value(text: str, origin: str) -> object:
    """Parse the value of ``--set key=value``: a YAML scalar, or ``[..]`` and ``{..}``."""
    return read_yaml(text, origin).data if text.strip() else ""


def _yaml() -> Any:
    return YAML(typ="safe", pure=True)


def _refuse(origin: str, line: int | None, why: str) -> NoReturn:
    raise RecipeError(f"{origin}{'' if line is None else f':{line + 1}'}: {why}")


def _check_events(text: str, origin: str) -> None:
    """Stream through the document once, before any tree is built from it."""
    depth = aliases = documents = 0
    for nodes, event in enumerate(_yaml().parse(text)):
        line = event.start_mark.line
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        elif isinstance(event, AliasEvent):
            aliases += 1
        elif isinstance(event, DocumentStartEvent):
            documents += 1
            if event.version or event.tags:
                _refuse(origin, line, "directives (%YAML, %TAG) are not allowed")
        if getattr(event, "tag", None) is not None:
            _refuse(origin, line, "tags (!...) are not allowed: a recipe is plain data and names no classes")
        for value, limit, what in (
            (depth, MAX_DEPTH, "levels"),
            (aliases, MAX_ALIASES, "aliases"),
            (nodes, MAX_NODES, "values"),
            (documents, 1, "document"),
        ):
            if value > limit:
                _refuse(origin, line, f"more than {limit} {what}")


class _Builder:
    """Turns nodes into plain data; counts what aliases expand to, so that a bomb stops early."""

    def __init__(self, source: RecipeText) -> None:
        self.source = source
        self.count = 0

    def build(self, node: Any, path: Path, depth: int) -> object:
        self.count += 1
        line = node.start_mark.line
        if self.count > MAX_NODES:
            _refuse(self.source.origin, line, f"aliases expand to more than {MAX_NODES} values")
        # An alias to one of its own parents ends here too: it only ever gets deeper.
        if depth > MAX_DEPTH + 1:
            _refuse(self.source.origin, line, f"more than {MAX_DEPTH} levels")
        self.source.lines.setdefault(path, line + 1)
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, number), depth + 1) for number, item in enumerate(node.value)]
        return _scalar(node, self.source.origin)

    def _mapping(self, node: MappingNode, path: Path, depth: int) -> dict[str, object]:
        table: dict[str, object] = {}
        origin = self.source.origin
        for key_node, value_node in node.value:
            line = key_node.start_mark.line
            if key_node.tag == _CORE + "merge":
                _refuse(origin, line, "merge keys (<<) are not allowed; write the keys out")
            key = _scalar(key_node, origin) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                _refuse(origin, line, "a key must be text")
            if key in table:
                first = self.source.lines[(*path, key)]
                _refuse(origin, line, f"the key {key[:60]!a} is doubled, first on line {first}")
            self.source.lines[(*path, key)] = line + 1
            table[key] = self.build(value_node, (*path, key), depth + 1)
        return table


def _scalar(node: ScalarNode, origin: str) -> object:
    """Plain scalars by the rules of YAML 1.2, in which ``2:4`` and ``no`` are text."""
    kind, text = str(node.tag).removeprefix(_CORE), str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and _INT.fullmatch(text) and len(text) <= 40:
        bare = text.replace("_", "").lower()
        return int(bare, 16 if "0x" in bare else 8 if "0o" in bare else 10)
    if kind == "float":
        try:
            value = float(text.replace("_", ""))
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf"):
            _refuse(origin, node.start_mark.line, f"{text[:40]} is not a finite number")
        return value
    return text
