"""The checks of single recipe values, with messages that say what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, WithJsonSchema
from pydantic_core import PydanticCustomError

from secateur.request import check_amount
from secateur.words import CRITERIA, GRANULARITIES, translated

_NAME = r"[A-Za-z0-9][A-Za-z0-9_:-]{0,63}"
_TYPE = r"type:[A-Za-z_][A-Za-z0-9_]*"


def problem(message: str) -> PydanticCustomError:
    """An error whose text reaches the user as it is."""
    # As a value and not as the template itself: braces in the text would be taken for fields.
    return PydanticCustomError("recipe", "{message}", {"message": message})


def _amount(name: str) -> Callable[[object], object]:
    """The check that every entry makes of this number of a target."""

    def check(value: object) -> object:
        wrong = check_amount(name, value)
        if wrong:
            raise problem(wrong)
        return value

    return check


def _choice(value: object) -> object:
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


def _criterion(value: object) -> object:
    return translated(_choice(value), CRITERIA)


def _granularity(value: object) -> object:
    return translated(_choice(value), GRANULARITIES)


def _granularities(value: object) -> object:
    return [_granularity(item) for item in value] if isinstance(value, (list, tuple)) and value else _granularity(value)


def _plain(value: object, *, depth: int) -> None:
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


def choice_schema(what: str) -> dict[str, object]:
    """The JSON schema of a name with options."""
    name = {"type": "string", "pattern": f"^{_NAME}$"}
    mapping = {"type": "object", "required": ["name"], "properties": {"name": name}}
    return {"anyOf": [name, mapping], "description": what}


Choice = Annotated[str | dict[str, object], BeforeValidator(_choice)]
Criterion = Annotated[
    str | dict[str, object],
    BeforeValidator(_criterion),
    WithJsonSchema(choice_schema("The rule that scores; a registered name.")),
]
Granularity = Annotated[
    str | dict[str, object] | list[str | dict[str, object]],
    BeforeValidator(_granularities),
    WithJsonSchema(
        {
            "anyOf": [
                choice_schema("A registered name."),
                {"type": "array", "items": choice_schema("A registered name."), "minItems": 1},
            ],
            "description": "What is removed; one granularity, or several in one ranking.",
        }
    ),
]


def _options(value: object) -> Any:
    if isinstance(value, dict):
        # Torch has names like T_max, which the names of our own options do not.
        _plain({str(key).lower(): item for key, item in value.items()}, depth=0)
    return value


def _schedule(value: object) -> object:
    """A name, or a mapping with a name; a name alone that is none of ours is one of torch's without options."""
    if isinstance(value, dict):
        options = {key: item for key, item in value.items() if key != "name"}
        chosen: Any = _choice({"name": value.get("name")})
        return {**chosen, **_options(options)}
    name = _choice(value)
    return name if name in FACTORS else {"name": name}


FACTORS = ("constant", "linear", "cosine")
Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
Options = Annotated[dict[str, object], BeforeValidator(_options)]
Schedule = Annotated[
    Choice,
    BeforeValidator(_schedule),
    WithJsonSchema(choice_schema("constant, linear, cosine, or a scheduler of torch.optim.lr_scheduler.")),
]
Allocation = Annotated[Choice, WithJsonSchema(choice_schema("How sparsity is spread over layers."))]


def _number(name: str, schema: dict[str, object], *, patterns: bool) -> Any:
    """The type of one entry of a target: checked by `secateur.request`, described for editors by a schema."""
    several = {"type": "object", "additionalProperties": schema, "minProperties": 1}
    shown = {"anyOf": [schema, several]} if patterns else schema
    return Annotated[Amount, BeforeValidator(_amount(name)), WithJsonSchema(shown)]


Amount = float | dict[str, float]
Sparsity = _number("sparsity", {"type": "number", "minimum": 0, "exclusiveMaximum": 1}, patterns=True)
Removals = _number("count", {"type": "integer", "minimum": 0}, patterns=True)
Threshold = _number("threshold", {"type": "number", "minimum": 0}, patterns=True)
Params = _number("params", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, patterns=False)
Macs = _number("macs", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, patterns=False)
Bytes = _number("memory_bytes", {"type": "integer", "minimum": 1}, patterns=False)
Milliseconds = _number("latency_ms", {"type": "number", "exclusiveMinimum": 0}, patterns=False)
Pattern = Annotated[str, AfterValidator(_pattern), Field(min_length=1, max_length=200)]
Patterns = Annotated[tuple[Pattern, ...], Strict(False), Field(max_length=1000)]
Count = Annotated[int, Field(ge=1, le=2**53)]
