from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from secateur.recipe import bundled, dump_recipe, json_schema, load_recipe
from secateur.recipe.reader import read_yaml

SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
ROOT = Path(__file__).parents[3]


def test_the_schema_is_a_schema_and_is_plain_json():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("name", bundled())
def test_bundled_recipes_fit_the_published_schema(name):
    text = (ROOT / "src/secateur/recipe/bundled" / f"{name}.yaml").read_text()
    VALIDATOR.validate(read_yaml(text, name).data)
    VALIDATOR.validate(read_yaml(dump_recipe(load_recipe(name)), name).data)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"target": {}},
        {"target": {"sparsity": 1}},
        {"target": {"sparsity": 50}},
        {"target": {"macs": 0}},
        {"target": {"macs": "0.5"}},
        {"target": {"sparsity": 0.5}, "criteria": "l1"},
        {"target": {"sparsity": 0.5}, "schema": 2},
        {"target": {"sparsity": 0.5}, "criterion": "os.system"},
        {"target": {"sparsity": 0.5}, "criterion": {"reduce": "mean"}},
        {"target": {"sparsity": 0.5}, "scope": "everything"},
        {"target": {"sparsity": 0.5}, "recover": [{"method": "finetune"}]},
        {"target": {"sparsity": 0.5}, "recover": [{"method": "finetune", "steps": 1, "epochs": 1}]},
        {"target": {"sparsity": 0.5}, "recover": [{"method": "prayer"}]},
        {"target": {"sparsity": 0.5}, "training": {"method": "gradual"}},
        {"target": {"sparsity": 0.5}, "training": {"method": "slimming", "steps": 2, "schedule": "cubic"}},
        {"target": {"sparsity": 0.5}, "training": {"method": "gradual", "steps": 2, "end": 1.5}},
        {"target": {"sparsity": 0.5}, "measure": {"rounds": 0}},
        {"target": {"sparsity": 0.5}, "protect": [""]},
    ],
    ids=str,
)
def test_schema_and_loader_refuse_the_same(bad):
    from secateur.errors import RecipeError

    assert not VALIDATOR.is_valid(bad)
    with pytest.raises(RecipeError):
        load_recipe(bad)


def keys() -> set[str]:
    """Every key of every object in the schema."""
    objects = [SCHEMA, *SCHEMA["$defs"].values()]
    return {key for item in objects for key in item.get("properties", {})}


def test_every_key_is_described_in_the_schema():
    for item in [SCHEMA, *SCHEMA["$defs"].values()]:
        assert item["description"]
        for key, value in item.get("properties", {}).items():
            assert value.get("description") or "$ref" in value, key


def test_the_reference_page_names_every_key_and_its_default():
    page = (ROOT / "docs/reference/recipe.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z_.\[\]]+)` \|[^|]*\|\s*([^|]*?)\s*\|", page, flags=re.MULTILINE))
    named = {key.split(".")[-1].removesuffix("[]") for key in rows}
    assert keys() <= named, keys() - named
    resolved = json.loads(load_recipe("target: {sparsity: 0.5}").model_dump_json(by_alias=True))
    for key in ("criterion", "granularity", "scope", "allocation", "min_keep", "round_to", "seed"):
        assert rows[key] == f"`{resolved[key]}`"
    for part in ("measure", "verify"):
        for key, value in resolved[part].items():
            if value is not None:
                assert rows[f"{part}.{key}"] == f"`{json.dumps(value)}`".replace('"', "")


def test_yaml_snippets_of_the_reference_page_load():
    page = (ROOT / "docs/reference/recipe.md").read_text()
    snippets = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(snippets) >= 2
    for snippet in snippets:
        load_recipe(snippet)


def test_the_published_schema_is_the_one_of_the_code():
    """Made anew with: python -m secateur.recipe > docs/reference/recipe.schema.json."""
    page = Path(__file__).parents[3] / "docs" / "reference" / "recipe.schema.json"
    assert json.loads(page.read_text()) == json_schema()
