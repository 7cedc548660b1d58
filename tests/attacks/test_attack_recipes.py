"""Hostile recipes: refused with exit code 2, fast, and without naming or loading anything."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

import hostile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.recipe import load_recipe


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", hostile.BAD_YAML)
def test_bad_yaml_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "r.yaml").write_text(hostile.BAD_YAML[name])
    modules, start = set(sys.modules), time.monotonic()
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "r.yaml")
    assert time.monotonic() - start < 5
    assert error.value.exit_code == 2
    text = str(error.value)
    assert "r.yaml" in text
    assert "hunter2" not in text
    assert "\x1b" not in text
    assert len(text) < 2000
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    assert not {name for name in set(sys.modules) - modules if not name.startswith(("ruamel", "encodings"))}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(set(hostile.BAD_YAML) - {"number"}))
def test_bad_yaml_is_refused_as_an_override(name):
    with pytest.raises(RecipeError):
        load_recipe("target: {sparsity: 0.5}", ["seed=" + hostile.BAD_YAML[name]])


def test_the_cases_differ_from_a_good_recipe():
    assert load_recipe("target: {sparsity: 0.5}\nprotect: [&a x, *a, *a]").protect == ("x", "x", "x")


FRAGMENTS = st.sampled_from(
    [
        ": ",
        "\n",
        "  ",
        "{",
        "}",
        "[",
        "]",
        "- ",
        "&a ",
        "*a",
        "!!",
        "<<",
        "? ",
        "'",
        '"',
        "|",
        ">",
        "%",
        "#",
        ",",
        "~",
        "\t",
    ]
) | st.sampled_from(["target", "sparsity", "0.5", "recover", "method", "finetune", "steps", "1e3", "---", "0x", "é"])


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=25).map("".join) | st.text(max_size=60))
def test_any_text_only_raises_our_errors(text):
    with suppress(RecipeError):
        load_recipe(text + "\n")


@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS | st.sampled_from([".", "=", "0"]), max_size=12).map("".join) | st.text(max_size=30))
def test_any_override_only_raises_our_errors(text):
    with suppress(RecipeError):
        load_recipe("target: {sparsity: 0.5}", [text])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(b"x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["target", "criterion", "protect", "recover", "measure", "verify", "seed", "scope", "schema", "min_keep", "x"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.integers(), VALUES, max_size=4))
def test_any_mapping_only_raises_our_errors(data):
    with suppress(RecipeError):
        load_recipe(data)
