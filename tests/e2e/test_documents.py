"""The documents of the command line and of the low-level surface: their Python runs, their flags and links exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from e2e_tools import ROOT

from secateur import errors
from secateur.cli.main import app

DOCUMENTS = ["README.md", "docs/reference/cli.md", "docs/reference/python.md", "docs/tutorials/first-run.md"]


def blocks(path: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL))


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/reference/python.md",
        "docs/how-to/masks-in-your-own-loop.md",
        "docs/how-to/lottery-tickets.md",
        "docs/how-to/distil.md",
        "docs/how-to/resume-a-run.md",
    ],
)
def test_python_blocks_run(document: str, work: Path) -> None:
    code = blocks(ROOT / document)
    assert "import secateur as sc" in code
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, document, "exec"), {"__name__": "documents"})


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
