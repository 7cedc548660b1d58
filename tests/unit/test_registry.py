"""One registry for names of things with options, and one spelling of "did you mean"."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import secateur
from secateur.errors import RecipeError
from secateur.registry import Registry, build, one_of, option_names, real_number, suggestion, whole_number


@dataclass(frozen=True, kw_only=True)
class Pear:
    weight: int = 1
    colour: str = "green"


def fruit() -> Registry[type]:
    registry = Registry[type]("fruit", "fruits")
    registry.register("pear")(Pear)
    return registry


def test_names_are_sorted_and_known():
    registry = fruit()
    registry.register("apple")(int)
    assert registry.names() == ["apple", "pear"]
    assert "pear" in registry
    assert "plum" not in registry
    assert list(registry) == ["pear", "apple"]
    registry.remove("apple")
    registry.remove("apple")
    assert registry.names() == ["pear"]


def test_build_passes_the_options():
    assert fruit().build("pear", {"weight": 3}) == Pear(weight=3)
    assert fruit().build("pear") == Pear()
    assert build(Pear, "a pear", {"colour": "red"}) == Pear(colour="red")
    assert option_names(Pear) == ["weight", "colour"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("paer", {}, ("unknown fruit 'paer'", "did you mean 'pear'?")),
        ("xyz", {}, ("unknown fruit 'xyz'", "known: 'pear', 'tool'")),
        ("tol", {}, ("unknown fruit 'tol'", "did you mean 'tool'?")),
        ("pear", {"wieght": 1}, ("fruit 'pear' has no option 'wieght'", "did you mean 'weight'?")),
    ],
)
def test_unknown_words_are_refused_with_the_nearest(name, options, words):
    with pytest.raises(RecipeError) as caught:
        fruit().build(name, options, also=["tool"])
    assert all(word in str(caught.value) for word in words)


def test_a_name_is_given_once():
    registry = fruit()

    class Impostor:
        pass

    with pytest.raises(TypeError, match="two fruits are called 'pear'"):
        registry.register("pear")(Impostor)
    assert registry.find("pear") is Pear
    again = type("Pear", (), {"__qualname__": Pear.__qualname__})  # what a reload of the module brings
    assert registry.register("pear")(again) is again
    assert registry.find("pear") is again


def test_one_of_names_the_option():
    one_of("colour", "red", ("red", "green"))
    with pytest.raises(RecipeError, match=r"colour='gren' is not known\n.*did you mean 'green'\?$"):
        one_of("colour", "gren", ("red", "green"))


def test_suggestion_shows_the_nearest_first_or_a_short_list():
    layers = ["fc2.weight", "fc1.weight", "fc1.bias"]
    assert suggestion("fc1.weigth", layers) == "did you mean 'fc1.weight'?"
    assert suggestion("fc.weight", layers) == "did you mean 'fc2.weight' or 'fc1.weight'?"
    assert suggestion("zzz", ["a", "b"]) == "known: 'a', 'b'"
    assert suggestion("zzz", []) == ""
    assert suggestion("zzz", ["a"], otherwise="look elsewhere") == "look elsewhere"
    assert suggestion("lenett", ["lenet"], form="demo:{}", otherwise="no") == "did you mean demo:lenet?"
    many = suggestion("zzz", [f"a{number}" for number in range(15)], form="{}")
    assert many == "known: " + ", ".join(f"a{number}" for number in range(12)) + " and 3 more"


def test_there_is_one_did_you_mean():
    root = Path(secateur.__file__).parent
    users = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "difflib" in path.read_text("utf-8")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name == "difflib" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "difflib")
    ]
    assert users == ["registry.py"]


def test_the_registry_needs_no_torch():
    code = "import sys, secateur.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("value", [True, 2.0, "3", None, -1, 1])
def test_what_is_no_whole_number_of_at_least_so_much_is_refused(value):
    with pytest.raises(RecipeError, match=r"^width=.* is not a whole number of at least 2"):
        whole_number("width", value, least=2)
    assert whole_number("width", 2, least=2) == 2


def test_an_option_that_is_needed_is_named():
    class Fig:
        def __init__(self, *, colour, size=1):
            self.colour, self.size = colour, size

    with pytest.raises(RecipeError, match="fruit 'pear' needs the option 'colour'"):
        build(Fig, "fruit 'pear'", {"size": 2})
    assert build(Fig, "fruit 'pear'", {"colour": "green"}).size == 1


@pytest.mark.parametrize("wrong", ["1", None, True, float("nan"), float("inf"), -0.5, [1.0]])
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(RecipeError, match=r"rate=.* is not a finite number of at least 0"):
        real_number("rate", wrong)
    assert real_number("rate", 2) == 2.0
    assert real_number("rate", -1.5, least=-2) == -1.5
