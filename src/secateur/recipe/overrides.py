"""Single values of a recipe, changed before it is checked: ``--set key=value``, and options such as ``--macs 0.5``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import RecipeError
from secateur.recipe.reader import Path, RecipeText, read_value
from secateur.recipe.schema import Recipe
from secateur.request import TARGETS

_CHOICES = ("criterion", "granularity", "allocation")


@dataclass(frozen=True)
class Setting:
    """One value that takes the place of the recipe's.

    Args:
        keys: where it goes, for example ("target", "macs").
        value: plain data.
        label: how it was asked for, for messages: "--macs 0.5".
        replaces: a key whose value in the recipe falls away first, but not what other settings put there.
        adds: whether a list is appended to the recipe's.
        usual: whether nobody asked for it, so that it comes first, and gives way to whatever was asked for.
    """

    keys: tuple[str, ...]
    value: Any
    label: str
    replaces: str = ""
    adds: bool = False
    usual: bool = False


def apply_overrides(source: RecipeText, overrides: Sequence[str | Setting]) -> dict[Path, str]:
    """Set values in the data of a recipe.

    A target of another kind takes the place of the recipe's target: who asks for ``target.sparsity`` does not ask for
    the multiply-accumulates of a recipe as well. What is there already is only changed.

    Args:
        source: read recipe; its data is changed.
        overrides: each a `Setting`, or ``a.b=value`` or ``a.0.b=value``. The value is YAML, ``null`` stands for "left
            out". A list grows by the index that comes next. Options of a criterion that is just named can be set
            directly: ``criterion.reduce=mean``.

    Returns:
        Path -> the override that set it, for messages.

    Raises:
        RecipeError: no ``=``, an empty key, a path that the recipe does not have, or two values for one key.
    """
    settings = [one if isinstance(one, Setting) else setting_of(one) for one in overrides]
    settings.sort(key=lambda one: not one.usual)
    _require_one_each(settings)
    if source.data is None and settings:
        source.data = {}
    if isinstance(source.data, dict):
        _make_room(source.data, settings)
    origins: dict[Path, str] = {}
    for one in settings:
        value = one.value
        if one.adds and isinstance(source.data, dict):
            value = [*(source.data.get(one.keys[0]) or ()), *value]
        origins[_assign(source.data, one.keys, value, one.label)] = one.label
    return origins


def setting_of(text: str, *, usual: bool = False) -> Setting:
    """``a.b=value`` as a setting; `usual` where nobody asked for it.

    Raises:
        RecipeError: no ``=``, or an empty key.
    """
    key, equals, value = text.partition("=")
    label = f"--set {text[:120]}"
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise RecipeError(f"{label}: write --set key=value, with dots between the parts of the key")
    return Setting(parts, read_value(value, label), label, usual=usual)


def _require_one_each(settings: Sequence[Setting]) -> None:
    """Refuse a value that another one would take the place of; to change a part of it is no contradiction.

    Raises:
        RecipeError: names both.
    """
    for number, one in enumerate(settings):
        for later in settings[number + 1 :]:
            within = one.keys[: len(later.keys)] == later.keys
            same = one.keys == later.keys and one.value == later.value
            if within and not (one.usual or same or later.adds):
                raise RecipeError(
                    f"{one.label} and {later.label} both say what {'.'.join(later.keys)} is.",
                    hint="Leave one of them out.",
                )


def _make_room(data: dict[str, object], settings: Sequence[Setting]) -> None:
    target = data.get("target")
    if not isinstance(target, dict):
        return
    named = [one.keys[1] for one in settings if one.keys[:1] == ("target",) and len(one.keys) == 2]
    # A misspelt name replaces nothing: it is refused in its own words.
    other = any(name in TARGETS and name not in target for name in named)
    if other or any(one.replaces == "target" for one in settings):
        data["target"] = {name: value for name, value in target.items() if name in named}


def value_of(text: str) -> object:
    """The number that a word of the command line stands for, or the word itself, which the check then answers.

    Example:
        >>> value_of("0.5"), value_of("50%"), value_of("true")
        (0.5, '50%', True)
    """
    words = {"true": True, "false": False, "null": None}
    if text in words:
        return words[text]
    for kind in (int, float):  # int first: "7" is a number of steps, and no 7.0
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def choice_of(word: str) -> str | dict[str, Any]:
    """``name`` or ``name:option=value:option=value``; a pattern such as ``2:4`` is a name.

    Raises:
        RecipeError: malformed.

    Example:
        >>> choice_of("magnitude:norm=l1"), choice_of("2:4")
        ({'name': 'magnitude', 'norm': 'l1'}, '2:4')
    """
    name, *options = word.strip().split(":")
    if not any("=" in option for option in options):
        if options and not name.isdecimal():
            raise RecipeError(f"{word!r} is malformed", hint="write name:option=value")
        return word.strip()
    found: dict[str, object] = {"name": name}
    for number, option in enumerate(options):
        key, equals, value = option.partition("=")
        if number == 0 and not equals:
            found["name"] = f"{name}:{option}"
            continue
        if not equals or not key:
            raise RecipeError(f"{word!r} is malformed", hint="write name:option=value")
        found[key] = value_of(value)
    return found


def _assign(data: Any, parts: tuple[str, ...], value: object, label: str) -> Path:
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


def _index(items: list[object], part: str, at: str, label: str) -> int:
    if not (part.isascii() and part.isdecimal() and len(part) < 6 and int(part) <= len(items)):
        raise RecipeError(f"{label}: {at} is a list of {len(items)}; {part[:60]!a} is no index from 0 to {len(items)}")
    return int(part)
