"""The manifest of an output folder: the SHA-256 of every other file, and whether a folder is ours as a whole."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from secateur.errors import FileRefusedError
from secateur.files.parse import parse_json
from secateur.files.paths import check_name, open_inside
from secateur.files.seeds import canonical_json

MANIFEST = "manifest.json"
MARKS = ("plan.json", "report.json", "deployed.json")  # every folder of ours has one of them
MAX_FILES = 256
MAX_BYTES = 1 << 18
MAX_OTHER_BYTES = 1 << 28  # of a file that is hashed and not read: a report, a recipe, a tokenizer
_HASH = re.compile(r"[0-9a-f]{64}")


def read_manifest(folder: Path) -> dict[str, str]:
    """The hashes that a folder records of its files.

    Args:
        folder: an output folder.

    Returns:
        relative name -> SHA-256 in hex; only names that stay inside the folder.

    Raises:
        FileRefusedError: no folder, no manifest, or not one mapping of harmless names to hashes, each once.
    """
    if not folder.is_dir():
        raise FileRefusedError(f"there is no folder {folder}", hint="give an output folder of prune, demo or deploy")
    with open_inside(folder, MANIFEST) as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _malformed(folder, f"it is larger than {MAX_BYTES} bytes")
    table = parse_json(data, origin=str(folder / MANIFEST), max_depth=1)  # refuses a name that stands there twice
    if not isinstance(table, dict) or not 0 < len(table) <= MAX_FILES:
        raise _malformed(folder, f"it does not list 1 to {MAX_FILES} files")
    for name, digest in table.items():
        check_name(name)
        if name == MANIFEST or not isinstance(digest, str) or not _HASH.fullmatch(digest):
            raise _malformed(folder, f"the hash of {name[:80]!a} is {str(digest)[:80]!a}, not 64 hex digits")
    if len({name.casefold() for name in table}) != len(table):
        raise _malformed(folder, "two names differ in upper and lower case only")
    return table


def require_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Check files against their recorded hashes.

    Args:
        folder: an output folder.
        hashes: relative name -> SHA-256.

    Raises:
        FileRefusedError: names the first file that is missing, a link, too large, or another than was recorded.

    Cost: every file is read once.
    """
    for name, recorded in hashes.items():
        if _digest(folder, name, MAX_OTHER_BYTES) != recorded:
            raise FileRefusedError(
                f"{name!a} in {folder} is refused: its SHA-256 is not the one that {MANIFEST} records",
                hint="the file was changed, damaged or exchanged; get the folder again",
            )


def _digest(folder: Path, name: str, max_bytes: int | None = None) -> str:
    with open_inside(folder, name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise FileRefusedError(f"{name!a} in {folder} is refused: it has {size} bytes, {max_bytes} at most")
        digest = hashlib.sha256()
        while data := stream.read(1 << 20):
            digest.update(data)
        return digest.hexdigest()


def _malformed(folder: Path, why: str) -> FileRefusedError:
    return FileRefusedError(
        f"{folder / MANIFEST} is refused: it is no manifest of secateur", why=why, hint="get the folder again"
    )


def seal(folder: Path) -> None:
    """Write the manifest of a finished folder, unless it has one."""
    if not (folder / MANIFEST).exists():
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        (folder / MANIFEST).write_text(canonical_json({name: _digest(folder, name) for name in names}))


def foreign(folder: Path, *, hashes: bool = True) -> str:
    """Why a folder is not ours as a whole; "" if it is empty, or holds what its manifest lists and nothing else.

    Args:
        folder: any folder; nothing in it is changed.
        hashes: compare the content of every file too.

    Cost: ends at the first thing that is not ours; with `hashes`, every file is read once.
    """
    with os.scandir(folder) as entries:
        if next(entries, None) is None:
            return ""
    try:
        listed = read_manifest(folder)
    except FileRefusedError:
        return f"holds other files, or no whole {MANIFEST}"
    if not any(mark in listed for mark in MARKS):
        return f"holds no {' or '.join(MARKS)} of ours"
    missing = set(listed)
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    for name in _entries(folder, folders):
        if name != MANIFEST and name not in listed:
            return f"holds {name[:80]!a}, which its {MANIFEST} does not list"
        missing.discard(name)
    if missing:
        return f"lacks {min(missing)[:80]!a}, which its {MANIFEST} lists"
    changed = next((name for name, recorded in listed.items() if hashes and not _holds(folder, name, recorded)), None)
    return "" if changed is None else f"holds {changed[:80]!a}, which was changed since it was written"


def _holds(folder: Path, name: str, recorded: str) -> bool:
    try:
        return _digest(folder, name) == recorded
    except FileRefusedError:
        return False


def _entries(folder: Path, folders: set[str]) -> Iterator[str]:
    """Relative names of everything in a folder; folders that hold nothing listed, and links, count as files."""
    for root, names, files in os.walk(folder):
        inner = Path(root).relative_to(folder)
        for name in names:
            if (inner / name).as_posix() not in folders or Path(root, name).is_symlink():
                yield (inner / name).as_posix()
        yield from ((inner / name).as_posix() for name in files)
