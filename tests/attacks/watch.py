"""What is watched while a hostile file is tried: what is run, started, changed, hung and printed."""

from __future__ import annotations

import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from secateur.errors import SecateurError

SECONDS = 5
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
)
WATCH: list[list[str]] = []


def _audit(event: str, args: tuple[object, ...]) -> None:
    if WATCH and (event in STARTS or event == "pickle.find_class"):
        WATCH[-1].append(f"{event} {args!r:.200}")


sys.addaudithook(_audit)


class Hung(BaseException):
    """Not an Exception: no handler of the code under test may take it for one of its own."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything under a folder that a reader might change."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        told = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() and told.st_size < 1 << 20 else b""
        found[str(path.relative_to(folder))] = (told.st_mode, told.st_size, told.st_mtime_ns, content)
    return found


def unseen(text: str) -> list[str]:
    return [char for char in text if unicodedata.category(char) in {"Cc", "Cf"} and char != "\n"]


def refused(action: Callable[[], object], here: Path, capfd: pytest.CaptureFixture[str]) -> SecateurError:
    """Do what must be refused, and check everything that a hostile file may want."""
    before, started = state(here), []
    WATCH.append(started)
    try:
        with at_most(SECONDS), pytest.raises(SecateurError) as caught:
            action()
    finally:
        WATCH.pop()
    assert started == [], "a program was started, or a pickle read"
    assert state(here) == before, "something was changed, deleted or written"
    assert not (here / "CANARY").exists(), "code was run"
    printed = capfd.readouterr()
    assert unseen(str(caught.value) + printed.out + printed.err) == []
    assert caught.value.what
    return caught.value
