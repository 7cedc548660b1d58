"""``--set key=value``: change single values of a recipe before it is checked."""

from __future__ import annotations

from typing import Any

from secateur.errors import RecipeError
from secateur.recipe.reader import Path, RecipeText, read_value
from secateur.recipe.schema import Recipe

_CHOICES = ("criterion", "granularity", "allocation")


def apply_overrides(source: RecipeText, overrides: list[str]) -> dict[Path, str]:
    """Set values in the data of a recipe.

    Args:
        source: read recipe; its data is changed.
        overrides: each ``a.b=value`` or ``a.0.b=value``. The value is YAML, ``null`` stands for "left out". A
            list grows by the index that comes next. Options of a criterion that is just named can be set
            directly: ``criterion.reduce=mean``.

    Returns:
        Path -> the override that set it, for messages.

    Raises:
        RecipeError: no ``=``, an empty key, or a path that the recipe does not have.
    """
    origins: dict[Path, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        label = f"--set {text[:120]}"
        parts = tuple(key.strip().split("."))
        if not equals or not all(parts):
            raise RecipeError(f"{label}: write --set key=value, with dots between the parts of the key")
        if source.data is None:
            source.data = {}
        path = _assign(source.data, parts, read_value(value, label), label)
        origins[path] = label
    return origins


def _assign(data: Any, parts: tuple[str, ...], value: Any, label: str) -> Path:
    path: Path = ()
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        at = ".".join(map(str, path)) or "the recipe"
        if isinstance(data, dict):
            key: str | int = part
            if not last and number == 0 and part in _CHOICES and not isinstance(data.get(part), dict):
                data[part] = {"name": data.get(part) or Recipe.model_fields[part].default}
            if not last and data.get(part) is None:
                data[part] = [] if parts[number + 1].isdecimal() else {}
        elif isinstance(data, list):
            key = _index(data, part, at, label)
            if key == len(data):
                data.append(None if last else {})
        else:
            raise RecipeError(f"{label}: {at} is a single value and has no key {part[:60]!a}")
        path = (*path, key)
        if last:
            data[key] = value
        else:
            data = data[key]
    return path


def _index(items: list[Any], part: str, at: str, label: str) -> int:
    if not (part.isascii() and part.isdecimal() and len(part) < 6 and int(part) <= len(items)):
        raise RecipeError(f"{label}: {at} is a list of {len(items)}; {part[:60]!a} is no index from 0 to {len(items)}")
    return int(part)
