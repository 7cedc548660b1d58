"""Names of unfinished files and folders, and how those of dead processes are found and cleaned up."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from secateur.files import disk

try:
    import fcntl
except ImportError:  # Windows has no flock; the process number alone decides there
    fcntl = None  # type: ignore[assignment]


def partial_path(target: Path) -> Path:
    """A fresh name beside ``target`` for what is still being written."""
    return target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(8)}")


def aside_path(target: Path) -> Path:
    """A fresh name beside ``target`` for a finished folder that is about to be replaced."""
    return target.with_name(f".{target.name}.old-{os.getpid()}-{secrets.token_hex(8)}")


def mark(fd: int) -> bool:
    """Mark an open file or folder as in use until it is closed or the process ends.

    Returns:
        False if somebody else holds the mark. File systems that know no such marks count as unmarked.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sweep(target: Path) -> None:
    """Clean up what killed processes left beside ``target``.

    A folder that was moved aside comes back if nothing has taken its place; all else is deleted. Both the
    process number and the mark are asked: a number can belong to another container, a mark is set only a
    moment after its folder is made.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|old)-(\d{1,10})-[0-9a-f]{16}")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[2])):
            with suppress(OSError):
                _clean(path, target, old=match[1] == "old")


def _clean(path: Path, target: Path, *, old: bool) -> None:
    # The link itself: what it points to is not ours.
    if path.is_symlink():
        path.unlink()
        return
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if not mark(fd):
            return  # another container reused the number: that process is alive after all
        if old and not os.path.lexists(target):
            disk.rename_new(path, target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(fd)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 asks and does nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
