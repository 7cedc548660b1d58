"""The few calls that change a disk, each in one place, so that a test can make the n-th of them fail."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import FileRefusedError, ResourceError, SecateurError

_AT_FDCWD = -100  # "relative to the current folder", as the system call spells it
_NOREPLACE, _EXCHANGE = 1, 2
# EPERM is here because older seccomp filters answer it for system calls that they do not know.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_EXHAUSTED = _FULL | {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


def create(path: Path) -> int:
    """Create a new file for writing and return its descriptor; an existing name is an error."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o666)


def make_folder(path: Path) -> None:
    """Create one new folder; an existing name is an error."""
    path.mkdir()


def write(fd: int, data: memoryview) -> None:
    """Write all of ``data``: the system may take it in several pieces."""
    while data:
        data = data[os.write(fd, data) :]


def fsync(fd: int) -> None:
    """Wait until the disk holds what was written."""
    os.fsync(fd)


def sync_path(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name; a file of that name is replaced in one step."""
    source.replace(target)


def rename_new(source: Path, target: Path) -> None:
    """Give a file or folder a name that nothing has yet.

    Raises:
        FileExistsError: something has the name.
    """
    if not _renameat2(source, target, _NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        rename(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))


def disk_error(error: OSError, path: Path) -> SecateurError:
    """Turn a system error into the error that tells the user what to do."""
    reason = error.strerror or str(error)
    if error.errno in _EXHAUSTED:
        return ResourceError(
            f"cannot write {path}: {reason}",
            why="the disk, the quota or another limit of this machine was reached, or the disk failed",
            hint="free space or write to another disk; no half-written file or folder was left behind",
        )
    hint = "choose a folder that exists and that you may write to"
    if error.errno in {errno.EEXIST, errno.ENOTEMPTY}:
        hint = "another process took this name meanwhile; choose another name, or use --force"
    return FileRefusedError(f"cannot write {path}: {reason}", hint=hint)


@contextmanager
def disk_errors(path: Path, *, only_full: bool = False) -> Iterator[None]:
    """Raise system errors of the body as errors of secateur.

    Args:
        path: what is being written, for the message.
        only_full: let everything pass but a full disk, a full quota and a too large file. Right for code
            that also reads other files, whose errors must keep their own names.

    Raises:
        ResourceError: disk, quota or descriptors are used up, or the disk failed.
        FileRefusedError: any other system error, unless ``only_full``.
    """
    try:
        yield
    except OSError as error:
        if only_full and error.errno not in _FULL:
            raise
        raise disk_error(error, path) from error
