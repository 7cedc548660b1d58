"""Errors: what, why, do, code; the exit code of each kind; where the words go."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys

import pytest
import torch

from secateur import errors
from secateur.cli import console, doctor
from secateur.cli.main import main


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(doctor, "self_check", broken)


KINDS = [
    (errors.RecipeError("a"), 2),
    (errors.InputError("a"), 3),
    (errors.NonFiniteError("a"), 3),
    (errors.FileRefusedError("a"), 3),
    (errors.PlanMismatchError("a"), 3),
    (errors.UnsupportedError("a"), 4),
    (errors.ForwardError("a"), 4),
    (errors.CertificateError("a"), 4),
    (errors.TargetError("a"), 5),
    (errors.ResourceError("a"), 6),
    (MemoryError(), 6),
    (torch.OutOfMemoryError("no room"), 6),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 TB"), 6),
    (OSError(errno.ENOSPC, "No space left on device"), 6),
    (OSError(errno.ENOENT, "No such file"), 1),
    (ZeroDivisionError("oops"), 1),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), KINDS, ids=lambda value: type(value).__name__)
def test_every_kind_has_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(error, monkeypatch)
    assert main(["doctor"]) == code
    text = capsys.readouterr()
    assert text.out == ""
    assert text.err.startswith("error: ")
    assert f"exit {code}" in text.err
    assert "Traceback" not in text.err
    fail_with(error, monkeypatch)
    assert main(["doctor", "--json"]) == code
    text = capsys.readouterr()
    assert text.out == ""
    told = json.loads(text.err)["error"]
    assert set(told) == {"what", "why", "do", "code", "exit_code"}
    assert told["exit_code"] == code
    assert told["code"].startswith("SEC")


def test_the_shape_of_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(errors.TargetError("too much", why="the rest is locked", hint="ask for less"), monkeypatch)
    main(["doctor"])
    assert capsys.readouterr().err.splitlines() == [
        "error: too much", "  why: the rest is locked", "  do: ask for less", "  code: SEC500, exit 5",
    ]  # fmt: skip


def test_a_traceback_only_with_v(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(ZeroDivisionError("oops"), monkeypatch)
    main(["doctor"])
    quiet = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: oops" in quiet
    assert "run it again with -v" in quiet
    main(["doctor", "-v"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_words_of_others_do_not_drive_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(errors.InputError("layer \x1b[31mred\x1b[0m [bold]x[/bold]"), monkeypatch)
    main(["doctor"])
    text = capsys.readouterr().err
    assert "\x1b" not in text
    assert "[bold]x[/bold]" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["prune"], "Missing argument"),
        (["prune", "demo:lenet"], "Missing option '--out'"),
        (["prune", "demo:lenet", "--out", "x", "--nope"], "--nope"),
        (["prune", "demo:lenet", "--out", "x", "--threads", "0"], "threads"),
        (["prune", "demo:lenet", "--out", "x", "--seed", "one"], "seed"),
        (["export", "d", "--model", "m", "--format", "onnx"], "Missing option '--out'"),
        (["criteria"], "Missing command"),
    ],
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    text = capsys.readouterr()
    assert said in text.err
    assert "do: See: secateur" in text.err
    assert text.out == ""


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    console.write("anything")


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"], ["--version"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    start = "import sys; from secateur.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", start, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        said = running.stderr.read()
    assert (running.returncode, said) == (0, "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color(monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["nothing-like-this"]) == 2
    assert ("\x1b[1;31m" in sys.stderr.getvalue()) is coloured  # type: ignore[attr-defined]


def test_tables_are_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("name", "n"), [("conv1", "6"), ("a\x1b[1m", "16")], title="t")
    assert capsys.readouterr().out == "t\nname      n\nconv1     6\na\\x1b[1m  16\n"


def test_tables_on_a_terminal_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal())
    console.table(("name", "n"), [("[red]conv1", "6")], title="t")
    text = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "[red]conv1" in text
    assert "─" in text
