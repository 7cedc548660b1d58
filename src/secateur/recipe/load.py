"""Recipes from files, text, mappings and the ones that come with the package."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from secateur.errors import FileRefusedError, RecipeError
from secateur.files.sniff import open_regular, refuse, sniff_stream
from secateur.recipe.overrides import Setting, apply_overrides, choice_of
from secateur.recipe.reader import MAX_BYTES, RecipeText, read_yaml
from secateur.recipe.reader import Path as Keys
from secateur.recipe.schema import Recipe
from secateur.registry import suggestion
from secateur.words import about_key, about_target

TIMED = ("rounds", "warmup", "seconds", "spread", "batch_size", "threads")  # keys of `measure` that say how


def load_recipe(source: str | Path | Mapping[str, object] | Recipe, overrides: Sequence[str | Setting] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a file, the name of a bundled recipe, YAML text (anything with a line break or ``": "``), a
            mapping, or a recipe.
        overrides: ``key=value`` texts as of ``--set``, or settings, applied in order before the check.

    Returns:
        The checked recipe, with all defaults filled in.

    Raises:
        RecipeError: every problem found, one per line, as ``file:line: key: problem``.
        FileRefusedError: the file is missing, unreadable, or no text.

    Example:
        >>> load_recipe("target: {sparsity: 0.5}", ["criterion=taylor"]).criterion
        'taylor'
    """
    read = _read(source)
    origins = apply_overrides(read, list(overrides))
    if not isinstance(read.data, dict):
        raise RecipeError(
            f"{read.where(())}: a recipe is a mapping of keys to values",
            hint="start with 'target: {sparsity: 0.5}'",
        )
    try:
        recipe = Recipe.model_validate(_without_nulls(read.data))
        _require_timed(recipe, origins)
        return recipe
    except ValidationError as error:
        problems = [_explain(item, read, origins) for item in error.errors(include_url=False)]
    # Outside of the handler, so that no traceback of pydantic stands above ours.
    raise RecipeError("\n".join(dict.fromkeys(problems)))


def _require_timed(recipe: Recipe, origins: Mapping[Keys, str]) -> None:
    """Refuse to set how latency is timed where it is not; a recipe that only turns it off keeps what it says of it."""
    for path, label in origins.items():
        if path[:1] == ("measure",) and path[-1] in TIMED and not recipe.measure.latency:
            raise RecipeError(f"{label}: measure.latency is false, so nothing is timed.", hint="Leave one of them out.")


def bundled() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("secateur.recipe") / "bundled"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every default filled in; ``load_recipe`` reads back an equal one."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 1_000_000
    yaml.dump(_quoted(recipe.model_dump(mode="json", by_alias=True, exclude_none=True)), stream)
    return stream.getvalue()


def _quoted(data: object) -> object:
    """Quote what readers of YAML 1.1 take for something else: 2:4 is 124 to them, no is false."""
    if isinstance(data, dict):
        return {key: _quoted(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_quoted(item) for item in data]
    if isinstance(data, str) and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{3,}", data):
        return DoubleQuotedScalarString(data)
    return data


def _read(source: str | Path | Mapping[str, object] | Recipe) -> RecipeText:
    if isinstance(source, Recipe):
        return RecipeText("recipe", source.model_dump(mode="json", by_alias=True))
    if isinstance(source, Mapping):
        # A copy, since overrides are written into it.
        return RecipeText("recipe", copy.deepcopy(dict(source)))
    # Text before names and files: a path with a line break or ": " in it is nobody's.
    if isinstance(source, str) and ("\n" in source or ": " in source or not source.strip()):
        return read_yaml(source, "recipe")
    if isinstance(source, str) and source in bundled():
        text = (resources.files("secateur.recipe") / "bundled" / f"{source}.yaml").read_text("utf-8")
        return read_yaml(text, f"{source}.yaml")
    return read_yaml(_file_text(Path(source)), str(source))


def _file_text(path: Path) -> str:
    try:
        stream = open_regular(path)
    except FileRefusedError as error:
        hint = suggestion(
            path.name, bundled(), form="the bundled recipe {}", otherwise="bundled: " + ", ".join(bundled())
        )
        raise FileRefusedError(error.what, hint=hint) from error
    with stream:
        kind = sniff_stream(stream)
        data = stream.read(MAX_BYTES + 1)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(path, kind, wanted="YAML") from error


def _without_nulls(data: object) -> object:
    """Null means "left out", so that ``--set recover.0.epochs=null`` takes a value away."""
    if isinstance(data, Mapping):
        return {key: _without_nulls(value) for key, value in data.items() if value is not None}
    if isinstance(data, list | tuple):
        return [_without_nulls(item) for item in data]
    return data


def _explain(error: ErrorDetails, read: RecipeText, origins: Mapping[Keys, str]) -> str:
    kind = error["type"]
    path = _keys(error["loc"], read.data, missing=kind in {"missing", "extra_forbidden"})
    where = _where(path, read, origins)
    key = ".".join(map(str, path))
    shown = key if key.isprintable() and len(key) <= 200 else ascii(key[:200])
    return ": ".join(filter(None, (where, shown, _message(error, path))))


def _message(error: ErrorDetails, path: Keys) -> str:
    kind, message = error["type"], str(error["msg"])
    if kind == "recipe":
        return message
    if kind == "extra_forbidden":
        fields = _model_at(error["loc"][:-1]).model_fields
        known = [field.alias or name for name, field in fields.items()]
        word = str(path[-1]).lower().replace("-", "_")
        answer = about_target(word) if path[:-1] == ("target",) else about_key(word) if len(path) == 1 else ""
        return "unknown key, " + (answer or suggestion(word, known, form="{}"))
    if kind == "missing":
        return "this key is needed" + (", for example target: {sparsity: 0.5}" if path == ("target",) else "")
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        found = error["ctx"].get("tag")
        said = f", not {str(found)[:60]!a}" if found else ""
        words = _methods("training" if path[:1] == ("training",) else "recover")
        return f"method must be one of {', '.join(map(str, words))}{said}"
    if kind in {"model_type", "model_attributes_type"}:
        message = "a mapping of keys to values is needed"
    said = f", not {error['input']!a}" if _short(error["input"]) else ""
    return f"{message[:1].lower()}{message[1:]}{said}"


def _where(path: Keys, read: RecipeText, origins: Mapping[Keys, str]) -> str:
    """The override that wrote the value (or something around or inside it), else the line in the file."""
    for set_path, label in reversed(list(origins.items())):
        shorter = min(len(path), len(set_path))
        if shorter and path[:shorter] == set_path[:shorter]:
            return label
    return read.where(path)


def _short(value: object) -> bool:
    return isinstance(value, str | int | float) and len(repr(value)) <= 60


def _keys(loc: tuple[str | int, ...], data: Any, *, missing: bool) -> Keys:
    """The path in the file; pydantic's also names the branches of a union, which no file has."""
    path: list[str | int] = []
    for number, part in enumerate(loc):
        length = len(data) if isinstance(data, list | tuple) else 0
        if part in (data if isinstance(data, Mapping) else range(length)):
            data = data[part]
        elif not (missing and number == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _model_at(loc: tuple[str | int, ...]) -> type[BaseModel]:
    """The model that a location of pydantic's lies in."""
    model: type[BaseModel] = Recipe
    for part in loc:
        field = model.model_fields.get(str(part))
        found = [] if field is None else _models(field.annotation)
        if len(found) == 1:
            model = found[0]
        elif field is None:
            model = {**_methods(), **_methods("training")}.get(part, model)
    return model


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _methods(key: str = "recover") -> dict[str | int, type[BaseModel]]:
    steps = _models(Recipe.model_fields[key].annotation)
    return {get_args(step.model_fields["method"].annotation)[0]: step for step in steps}


def steps_of(text: str) -> list[object]:
    """Recovery steps as one word: ``none``, ``STEP:option=value,STEP``, or the steps of a recipe by name or file.

    Raises:
        RecipeError: malformed.

    Example:
        >>> steps_of("bn_refresh,finetune:epochs=3")
        [{'method': 'bn_refresh'}, {'method': 'finetune', 'epochs': 3}]
    """
    if text in ("none", ""):
        return []
    if text in bundled() or text.endswith((".yaml", ".yml")):
        plain = load_recipe(text).model_dump(mode="json", by_alias=True, exclude_none=True)
        return list(plain["recover"])
    choices = [choice_of(word) for word in text.split(",")]
    named = [choice if isinstance(choice, dict) else {"name": choice} for choice in choices]
    # A fine-tuning of no length is refused by the recipe; who writes its name alone means the usual one.
    usual = {"finetune": {"epochs": 3}}
    return [
        {"method": one.pop("name"), **one} if len(one) > 1 else {"method": one["name"], **usual.get(one["name"], {})}
        for one in named
    ]
