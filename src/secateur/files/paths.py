"""Names of files that come out of other files: they stay in their folder, on every system."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from secateur.errors import FileRefusedError

# Devices on Windows, whatever extension follows: "con.json" opens the console.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def check_name(name: str) -> tuple[str, ...]:
    r"""Split a relative name into its parts, or refuse it.

    The rules of POSIX and of Windows hold together, on every system: what is harmless on one is a way out
    of the folder on the other.

    Args:
        name: relative, with ``/`` between the parts.

    Returns:
        The parts.

    Raises:
        FileRefusedError: absolute, a drive, UNC, ``..``, ``\``, ``:``, control characters, names that
            Windows keeps for itself, a part that ends in a dot or space, or longer than 1024 characters.

    Example:
        >>> check_name("shards/model-00001.safetensors")
        ('shards', 'model-00001.safetensors')
    """
    parts = tuple(name.split("/"))
    bad_character = any(ord(c) < 32 or ord(c) == 127 or c in '\\:<>"|?*' for c in name)
    bad_part = any(
        part in {"", ".", ".."} or part[-1] in ". " or _RESERVED.fullmatch(part) or len(part) > 255 for part in parts
    )
    if bad_character or bad_part or len(name) > 1024:
        raise FileRefusedError(
            f"the file name {name[:120]!a} is refused",
            why="names that come out of a file must stay in its folder, by the rules of every system",
        )
    return parts


def open_inside(folder: str | Path, name: str) -> BinaryIO:
    """Open a file whose name was read from another file.

    Args:
        folder: the folder that it may not leave.
        name: relative name, checked by ``check_name``.

    Returns:
        The open file. Links are refused at every step, symbolic ones by the system itself while opening, so
        that nobody can swap one in between a check and its use; a file with several hard links as well.

    Raises:
        FileRefusedError: the name is refused, or it is missing, a link, or no ordinary file.
    """
    parts = check_name(name)
    nofollow = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    fd = None
    try:
        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        # Step by step from the folder's descriptor: a path as a whole could be moved under us between two checks.
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            flags = os.O_RDONLY | nofollow | (0 if last else getattr(os, "O_DIRECTORY", 0))
            inner = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = inner
    except OSError as error:
        if fd is not None:
            os.close(fd)
        raise FileRefusedError(
            f"cannot read {name!a} in {folder}: {error.strerror}",
            why="it is missing, or a link, which is never followed for a name that comes out of a file",
        ) from error
    found = os.fstat(fd)
    # A second hard link could lead to a file outside the folder, and no path would show it.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        raise FileRefusedError(
            f"{name!a} in {folder} is refused", why="it is not an ordinary file, or it has several hard links"
        )
    return os.fdopen(fd, "rb")
