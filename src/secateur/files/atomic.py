"""Write files and folders so that a reader, a full disk or a kill finds them whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import FileRefusedError
from secateur.files import disk
from secateur.files.leftovers import aside_path, mark, partial_path, sweep
from secateur.files.manifest import foreign, seal


class Sink:
    """A file being written: takes bytes and keeps their SHA-256."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``."""
        view = memoryview(data).cast("B")
        disk.write(self._fd, view)
        self._digest.update(view)

    @property
    def sha256(self) -> str:
        """SHA-256 of everything written so far, in hex."""
        return self._digest.hexdigest()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Sink]:
    """Write a file piece by piece; it gets its name only when all of it is on the disk.

    Args:
        path: the file; one that exists is replaced in one step, so a reader sees the old or the new one.

    Yields:
        A sink with ``write``.

    Raises:
        ResourceError: the disk or the quota is full.
        FileRefusedError: the folder is missing or may not be written, or ``path`` is a folder.
    """
    target = Path(path)
    with disk.disk_errors(target):
        if target.is_dir():
            raise FileRefusedError(f"cannot write the file {target}: a folder has that name")
        sweep(target)
        temp = partial_path(target)
        # Inside the try already: an interrupt may come when the file is there and its descriptor not yet.
        try:
            fd = disk.create(temp)
            mark(fd)
            try:
                yield Sink(fd)
                disk.fsync(fd)
            finally:
                os.close(fd)
            disk.rename(temp, target)
            _sync_folder(target.parent)
        finally:
            with suppress(OSError):
                temp.unlink()


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a small file in one go, whole or not at all.

    Args:
        path: the file; one that exists is replaced in one step, so a reader sees the old or the new one.
        data: bytes, or text that is written as UTF-8.

    Raises:
        ResourceError: the disk or the quota is full.
        FileRefusedError: the folder is missing or may not be written, or ``path`` is a folder.

    Cost: two fsyncs; milliseconds on most disks, so not for logs that grow line by line.
    """
    with atomic_file(path) as sink:
        sink.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def publish_dir(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Build a folder under a hidden name and publish it whole, or not at all.

    The body writes into the yielded folder with whatever means it likes. When the body ends well, a
    ``manifest.json`` with the hash of every file joins them (unless the body wrote one), every file
    is flushed to the disk and the folder gets its name in one step. After an error, an interrupt or a kill
    there is what was there before: nothing, or the whole old folder.

    Args:
        path: the folder to publish. Missing parents are made.
        force: replace a folder that is there, if it is empty or all of it is ours: a manifest, and nothing but the
            files that it lists, with the hashes that it lists. Anything else is never replaced.

    Yields:
        The hidden folder, in the same parent, so that the last step is a rename and not a copy.

    Raises:
        FileRefusedError: the target exists, is no output folder of secateur, or cannot be written.
        ResourceError: the disk or the quota is full.

    Cost: one fsync per file and folder; with `force`, the old folder is read once. For a moment old and new need disk
    space together.
    """
    target = absolute(Path(path))
    with disk.disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        require_free(target, force=force)
    temp, fd = partial_path(target), None
    try:
        with disk.disk_errors(target):
            disk.make_folder(temp)
            fd = os.open(temp, os.O_RDONLY)
            mark(fd)
        with disk.disk_errors(target, only_full=True):
            yield temp
        with disk.disk_errors(target):
            seal(temp)
            _sync_tree(temp)
            _commit(temp, target, force=force)
    finally:
        if fd is not None:
            os.close(fd)
        shutil.rmtree(temp, ignore_errors=True)


def absolute(path: Path) -> Path:
    """The path without links in its folders; a link in its last part stays as it is."""
    full = path.absolute()
    return full.resolve() if full.name in {"", ".."} else full.parent.resolve() / full.name


def require_free(target: Path, *, force: bool, hashes: bool = True) -> None:
    """Refuse a target that may not be (over)written.

    Args:
        target: the folder that would be written.
        force: whether a folder of ours may be replaced.
        hashes: read every file of it and compare; else only what is there is looked at.

    Raises:
        FileRefusedError: something is there that stays.
    """
    if not os.path.lexists(target):
        return
    if not force:
        raise FileRefusedError(
            f"{target} exists already",
            why="an output is never overwritten unless asked",
            hint="choose another folder, or use --force to replace it",
        )
    reason = _why_not_replaceable(target, hashes=hashes)
    if reason:
        raise _not_ours(target, reason)


def _not_ours(target: Path, reason: str) -> FileRefusedError:
    return FileRefusedError(
        f"--force does not replace {target}",
        why=f"it {reason}; only an empty folder is ever replaced, or an output folder of secateur with nothing in it "
        "but what its manifest.json lists, unchanged",
        hint="choose another folder, or remove this one yourself",
    )


def _why_not_replaceable(target: Path, *, hashes: bool) -> str:
    if target.is_symlink() or not target.is_dir():
        return "is not a folder"
    # A report.json that lies about in a home folder must not cost the home folder.
    for name, place in (("the current folder", Path.cwd()), ("the home folder", Path("~").expanduser())):
        if target == place or target in place.parents:
            return f"holds {name}"
    if (target / ".git").exists():
        return "is a git repository"
    return foreign(target, hashes=hashes)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                disk.sync_path(path)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        disk.sync_path(folder)


def _commit(temp: Path, target: Path, *, force: bool) -> None:
    """Put ``temp`` in place; afterwards ``temp`` is gone or holds what was there before."""
    require_free(target, force=force, hashes=False)
    # Without force a folder that appeared since the check is somebody else's, who was first: it is never swapped out.
    replaces = force and os.path.lexists(target)
    if replaces:
        _swap(temp, target)
        reason = foreign(temp, hashes=False)
        if reason:
            # Somebody put a file there between the last look and the swap: it comes back with its folder.
            _swap(temp, target)
            raise _not_ours(target, reason)
    else:
        disk.rename_new(temp, target)
    try:
        _sync_folder(target.parent)
    except OSError:
        # The caller hears that nothing was published, so the old state comes back if the disk lets it.
        with suppress(OSError):
            _swap(temp, target) if replaces else disk.rename_new(target, temp)
        raise


def _swap(temp: Path, target: Path) -> None:
    """Exchange two folders: in one step where the system can, else by way of a third name."""
    if disk.exchange(temp, target):
        return
    aside = aside_path(target)
    try:
        disk.rename(target, aside)
        disk.rename(temp, target)
        disk.rename(aside, temp)
    except BaseException:
        if os.path.lexists(aside):
            _undo_swap(temp, target, aside)
        raise


def _undo_swap(temp: Path, target: Path, aside: Path) -> None:
    """Whatever the last rename did before it failed, the names tell how far the swap came."""
    try:
        if os.path.lexists(target):
            disk.rename(target, temp)
        disk.rename(aside, target)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the old folder is kept as {aside}") from error
