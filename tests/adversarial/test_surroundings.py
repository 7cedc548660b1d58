"""What a model asks of its surroundings stands among the conditions of its plan, with the line."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc

from .cases import CASES
from .families import all_cases
from .harness import build

NAMES = [name for name in all_cases() if name.startswith("surroundings/")]


@pytest.mark.parametrize("name", NAMES)
def test_the_line_is_said(name: str) -> None:
    case = CASES[name]
    view = sc.inspect(build(case), case.inputs[0]())
    wheres = [condition.where for condition in view.conditions]
    lines = [re.fullmatch(r".*family_surroundings\.py:(\d+)", where) for where in wheres]
    file = str(Path(__file__).with_name("family_surroundings.py"))
    assert any("the other path" in linecache.getline(file, int(found[1])) for found in lines if found), wheres


def test_plain_constants_are_no_surroundings() -> None:
    """Numbers and functions of a module are not asked for as flags."""
    case = CASES["ambient/ManyRows"]
    view = sc.inspect(build(case), case.inputs[0]())
    assert not [condition for condition in view.conditions if "surroundings" in condition.text]


def test_a_class_without_source_is_named() -> None:
    """Nothing tells what it decides by."""
    code = "class Hidden(nn.Sequential):\n    def forward(self, x):\n        return super().forward(x)"
    space = {"nn": nn, "__name__": "hidden"}
    exec(code, space)
    model = space["Hidden"](nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))  # type: ignore[operator]
    view = sc.inspect(model, torch.randn(3, 8))
    assert any("the source of Hidden cannot be read" in condition.text for condition in view.conditions)
