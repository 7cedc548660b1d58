"""The page of expectations stays true: what it names is there, and only conda and docker are a no."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from e2e_tools import ROOT

PAGE = (ROOT / "docs/reference/expectations.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for part in re.findall(r"^\|---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    for line in part.splitlines()
]


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_a_row_names_is_there(row: list[str]) -> None:
    what, answer, shown = row
    named = re.findall(r"`(tests/[^`]*)`", shown)
    pages = re.findall(r"\]\(([^)#]+)", shown)
    assert what
    assert answer
    assert named or pages, "every row is shown by something"
    for one in named:
        path, _, name = one.partition("::")
        assert name in functions_of(path), one
    for page in pages:
        assert (ROOT / "docs/reference" / page).exists(), page


def test_only_conda_and_docker_are_a_no() -> None:
    begin, end = PAGE.index("## Expectations"), PAGE.index("## What new users")
    answers = {row[0]: row[1] for row in ROWS if f"| {row[0]} | {row[1]} |" in PAGE[begin:end]}
    assert len(answers) > 25
    assert set(answers.values()) == {"yes", "no"}
    assert {what for what, answer in answers.items() if answer == "no"} == {"conda", "docker"}
    assert len(ROWS) > 65
