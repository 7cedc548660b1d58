"""The documents of the command line and of the low-level surface: their Python runs, their flags and links exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from e2e_tools import QUICK, ROOT, Cli

import secateur
from secateur import errors, words
from secateur.cli.main import app
from secateur.criteria.base import CRITERIA
from secateur.request import TARGETS

DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "docs/README.md", "docs/reference/cli.md", "docs/reference/python.md",
    "docs/reference/words.md", "docs/tutorials/first-run.md", "docs/how-to/hugging-face.md",
    "docs/how-to/prune-your-own-model.md", "docs/how-to/at-most-this-loss.md", "docs/how-to/search.md",
    "docs/project/releases.md",
]  # fmt: skip


def blocks(path: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL))


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/reference/python.md",
        "docs/how-to/masks-in-your-own-loop.md",
        "docs/how-to/lottery-tickets.md",
        "docs/how-to/distil.md",
        "docs/how-to/at-most-this-loss.md",
        "docs/how-to/search.md",
        "docs/how-to/resume-a-run.md",
        "docs/how-to/hugging-face.md",
    ],
)
def test_python_blocks_run(document: str, work: Path) -> None:
    if "hugging" in document:
        pytest.importorskip("transformers")
    if "search" in document:
        pytest.importorskip("optuna")
    code = blocks(ROOT / document)
    assert "import secateur as sc" in code
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = set(CRITERIA)
        try:
            # As a file of its own: without the future imports of this one.
            exec(compile(code, document, "exec", dont_inherit=True), {"__name__": "documents"})
        finally:
            for name in set(CRITERIA) - known:
                CRITERIA.remove(name)  # a page may register one, and other tests walk over all


def _flags(command: Any) -> set[str]:
    own = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
    return own.union(*(_flags(child) for child in getattr(command, "commands", {}).values()))


def test_the_reference_names_every_command_and_flag() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text("utf-8")
    root = typer.main.get_command(app)
    shown = [name for name, command in root.commands.items() if not command.hidden]  # type: ignore[attr-defined]
    assert {"demo", "prune", "advise", "compare"} <= set(shown)
    for name in shown:
        assert f"## {name}" in text, name
        missing = {flag for flag in _flags(root.commands[name]) if flag not in text}  # type: ignore[attr-defined]
        assert missing == set(), name


def test_the_reference_names_every_error_and_exit_code() -> None:
    text = (ROOT / "docs/reference/python.md").read_text("utf-8")
    known = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SecateurError)
    ]
    for kind in known:
        if kind is not errors.SecateurError:
            assert f"| `{kind.__name__}` | {kind.exit_code} |" in text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_named_files_exist(document: str) -> None:
    path = ROOT / document
    text = path.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for target in re.findall(r"`((?:docs|examples)/[\w/.-]+)`", text):
        assert (ROOT / target).exists(), target


def test_the_tutorial_can_be_followed_from_an_empty_folder(cli: Cli, work: Path) -> None:
    text = (ROOT / "docs/tutorials/first-run.md").read_text("utf-8")
    file, load = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (work / "lenet.py").write_text(file)
    commands = [line for line in text.splitlines() if line.startswith("secateur ") and "demo" not in line.split()[1]]
    assert [line.split()[1] for line in commands] == ["inspect", "estimate", "prune"]
    for line in commands:
        # Pictures of noise in the place of the digits, which another test of the demo reads.
        words = line.replace("demo:mnist", "npz:d.npz").split()[1:]
        done = cli(*words, *(QUICK if words[0] == "prune" else ()))
        assert done.code == 0, done.err
    space: dict[str, Any] = {}
    exec(compile(load, "first-run.md", "exec"), space)
    assert space["model"][0].out_channels < 20


def test_words_of_the_table_are_those_of_the_code() -> None:
    text = (ROOT / "docs/reference/words.md").read_text("utf-8")
    understood, answered = text.split("## Answered")[0], text.split("## Answered")[1].split("## Side")[0]
    first = "".join(
        line.split("|")[1]
        for line in understood.splitlines()
        if line.startswith("| g") or line.startswith("| criterion")
    )
    for word in re.findall(r"`([\w:]+)`", first):
        assert word in words.GRANULARITIES or word in words.CRITERIA, word
    for line in answered.splitlines()[4:]:
        for word in re.findall(r"`(\w+)`", line.split("|")[1]) if line.startswith("|") else ():
            known = (words.ABOUT_GRANULARITIES, words.ABOUT_CRITERIA, words.ABOUT_TARGETS, words.ABOUT_KEYS)
            assert any(word in table for table in known), word


def test_the_reference_names_everything_that_is_public() -> None:
    first = (ROOT / "docs/reference/python.md").read_text("utf-8").split("\n\n")[1]
    named = set(re.findall(r"`(\w+)`", first))
    assert set(secateur.__all__) <= named
    assert {name for name in named if hasattr(secateur, name)} == set(secateur.__all__)


def test_the_reference_lists_every_target() -> None:
    text = (ROOT / "docs/reference/python.md").read_text("utf-8")
    table = text[text.index("| target |") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(TARGETS)
