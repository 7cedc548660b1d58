"""The checks of single recipe values, with messages that say what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, WithJsonSchema
from pydantic_core import PydanticCustomError

_NAME = r"[A-Za-z0-9][A-Za-z0-9_:-]{0,63}"
_TYPE = r"type:[A-Za-z_][A-Za-z0-9_]*"
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")


def problem(message: str) -> PydanticCustomError:
    """An error whose text reaches the user as it is."""
    # As a value and not as the template itself: braces in the text would be taken for fields.
    return PydanticCustomError("recipe", "{message}", {"message": message})


def _fraction(name: str, text: str, *, zero: bool, one: bool) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        percent = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        if percent:
            value = float(percent[1])
            raise problem(f"{name} {text}: {value:g}% is a percentage, write {value / 100:g}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        if 1 < value <= 100:
            raise problem(f"{name} {text}: {value:g} looks like a percentage, write {value / 100:g}")
        inside = 0 < value < 1 or (zero and value == 0) or (one and value == 1)
        if not inside:
            raise problem(f"{name} {text}, not {value:g}")
        return value

    return check


def _choice(value: Any) -> Any:
    name = value.get("name") if isinstance(value, dict) else value
    if isinstance(value, bool) or not isinstance(name, str):
        raise problem("write a name, or a mapping with name and its options")
    if not re.fullmatch(_NAME, name):
        raise problem(
            f"{name[:60]!a} is no name: letters, digits, '_', '-' and ':' only. Names are looked up in "
            "secateur's own registry and never imported"
        )
    if isinstance(value, dict):
        _plain(value, depth=0)
    return value


def _plain(value: Any, *, depth: int) -> None:
    if depth > 4:
        raise problem("options nest too deep")
    if isinstance(value, dict):
        if not all(isinstance(key, str) and re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in value):
            raise problem("option names are lower-case words: letters, digits and '_'")
        for item in value.values():
            _plain(item, depth=depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _plain(item, depth=depth + 1)
    elif not (value is None or isinstance(value, str | int | float)):
        raise problem(f"an option is a number, text, list or mapping, not {type(value).__name__}")
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise problem("an option must be a finite number")


def _pattern(value: str) -> str:
    if not value or len(value) > 200 or not value.isprintable():
        raise problem("a pattern has 1 to 200 printable characters")
    if value.startswith("type:") and not re.fullmatch(_TYPE, value):
        raise problem(f"{value!a} is no class name: write type:Linear, without dots")
    if value.startswith("tag:") and not re.fullmatch(r"tag:[\w-]+", value):
        raise problem(f"{value!a} is no tag: write tag:word")
    return value


def _choice_schema(what: str) -> dict[str, Any]:
    name = {"type": "string", "pattern": f"^{_NAME}$"}
    mapping = {"type": "object", "required": ["name"], "properties": {"name": name}}
    return {"anyOf": [name, mapping], "description": what}


REMOVED = "is a fraction in [0, 1)"
KEPT = "is the fraction kept, in (0, 1]"

Choice = Annotated[str | dict[str, Any], BeforeValidator(_choice)]
Criterion = Annotated[Choice, WithJsonSchema(_choice_schema("The rule that scores; a registered name."))]
Granularity = Annotated[Choice, WithJsonSchema(_choice_schema("What is removed; a registered name."))]
Allocation = Annotated[Choice, WithJsonSchema(_choice_schema("How sparsity is spread over layers."))]
Sparsity = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_fraction("sparsity", REMOVED, zero=True, one=False))]
Params = Annotated[float, Field(gt=0, le=1), BeforeValidator(_fraction("params", KEPT, zero=False, one=True))]
Macs = Annotated[float, Field(gt=0, le=1), BeforeValidator(_fraction("macs", KEPT, zero=False, one=True))]
Pattern = Annotated[str, AfterValidator(_pattern), Field(min_length=1, max_length=200)]
Patterns = Annotated[tuple[Pattern, ...], Strict(False), Field(max_length=1000)]
Count = Annotated[int, Field(ge=1, le=2**53)]
