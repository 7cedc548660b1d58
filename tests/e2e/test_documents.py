"""The reference names what there is: commands, flags, errors, words, targets; the tutorial can be followed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from e2e_tools import QUICK, ROOT, Cli

import secateur
from secateur import errors, words
from secateur.cli.main import app
from secateur.request import TARGETS


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


def commands(page: str) -> list[str]:
    """Lines of the page's blocks that one types into a shell, without what only shows their form."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in found if language in ("", "sh", "bash", "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"(torchrun .*-m )?secateur ", line.removeprefix("$ "))]


PAGES = ("README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_of_the_page_is_one(page: str) -> None:
    root: Any = typer.main.get_command(app)
    for line in commands(page):
        typed = shlex.split(re.split(r" [|>] | && ", line)[0], comments=True)
        command, name, rest = root, "", typed[typed.index("secateur") + 1 :]
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            name, rest = rest[0], rest[1:]
            assert name in command.commands, line
            command = command.commands[name]
        try:
            command.make_context(name, list(rest), resilient_parsing="--help" in rest or command is root)
        except typer.Exit:
            pass
        except Exception as error:
            raise AssertionError(f"{line}: {error}") from error
