"""Tell what a file is from its bytes; its name proves nothing."""

from __future__ import annotations

import io
import os
import pickletools
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from secateur.errors import FileRefusedError
from secateur.files.paths import open_inside

MAX_HEADER = 100_000_000  # the limit of the safetensors library
_WINDOW = 65_536
_SIGNATURES = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"PK\x07\x08", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"GGUF", "gguf"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"\x93NUMPY", "numpy"),
    (b"\x7fELF", "program"),
    (b"#!", "program"),
)
_DANGER = {
    "pickle": "a pickle can run any code when it is loaded",
    "torch": "it is a torch archive, which holds a pickle, and a pickle can run any code when it is loaded",
    "zip": "it is a zip archive; archives can hold pickles and are never unpacked",
    "tar": "it is a tar archive; archives can hold pickles and are never unpacked",
}
_UNPACK = {"gzip", "7z", "bzip2", "xz", "zstd"}


def open_regular(path: Path, *, within: Path | None = None) -> BinaryIO:
    """Open an ordinary file for reading; folders, pipes and devices are refused.

    Args:
        path: the file. A name that was read from another file must come with ``within``.
        within: folder that the file must not leave, neither by ``..`` nor by a link.

    Raises:
        FileRefusedError: the file is missing, unreadable or no ordinary file, or leaves ``within``.
    """
    try:
        if within is not None:
            return open_inside(within, str(path))
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileRefusedError(f"cannot read {path}: {reason}", hint="check the path") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileRefusedError(f"cannot read {path}: it is not an ordinary file")
    return os.fdopen(fd, "rb")


def sniff(path: str | Path) -> str:
    """Name the kind of a file from its content.

    Args:
        path: any file; nothing in it is run or unpacked.

    Returns:
        "safetensors", "json", "pickle", "torch", "zip", "tar", "gzip", "7z", "bzip2", "xz", "zstd", "gguf",
        "hdf5", "numpy", "program", "text", "empty" or "unknown". A file that is two things at once counts as
        the more dangerous one. "safetensors" and "json" mean that the beginning looks like it; only loading
        checks the rest.

    Raises:
        FileRefusedError: the file is missing, unreadable or no ordinary file.
    """
    with open_regular(Path(path)) as stream:
        return sniff_stream(stream)


def sniff_stream(stream: BinaryIO) -> str:
    """As ``sniff``, for an open file; the position is at the start afterwards."""
    stream.seek(0)
    head = stream.read(_WINDOW)
    size = stream.seek(0, os.SEEK_END)
    kind = _kind(head, size, stream)
    stream.seek(0)
    return kind


def refuse(path: Path, kind: str, *, wanted: str) -> FileRefusedError:
    """The error for a file of the wrong kind."""
    why = _DANGER.get(kind, f"it is compressed ({kind})" if kind in _UNPACK else f"its content is {kind}")
    hint = f"give a {wanted} file"
    if kind in {"pickle", "torch"}:
        hint = (
            "if you trust where it comes from, load it yourself with torch.load(..., weights_only=True) and "
            "write it again with secateur.files.save_tensors"
        )
    elif kind in _UNPACK or kind in {"zip", "tar"}:
        hint = f"unpack it yourself if you trust where it comes from, and give the {wanted} file"
    return FileRefusedError(f"{path} is refused: {wanted} was expected", why=why, hint=hint)


def _kind(head: bytes, size: int, stream: BinaryIO) -> str:
    if not head:
        return "empty"
    # The dangerous kinds first: a file can be two things at once, and the reader chooses.
    if _is_tar(head):
        return "tar"
    if _has_zip_tail(stream, size):
        return "torch" if b"data.pkl" in head else "zip"
    # Before the signatures: the length of a header may look like one of the short ones.
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return "torch" if kind == "zip" and b"data.pkl" in head else kind
    if _is_pickle(head, size):
        return "pickle"
    return _text(head, whole=len(head) == size)


def _is_tar(head: bytes) -> bool:
    """A tar header is known by its checksum: the sum of its bytes with the checksum itself as spaces."""
    if len(head) < 512:
        return False
    try:
        said = int(head[148:156].strip(b" \x00") or b"-1", 8)
    except ValueError:
        return False
    return said == sum(head[:148]) + 8 * 32 + sum(head[156:512]) and said > 8 * 32


def _has_zip_tail(stream: BinaryIO, size: int) -> bool:
    """Whether the file ends as a zip does: zips are read from the end, so any file can carry one."""
    stream.seek(max(0, size - 22 - 65_535))
    tail = stream.read()
    start = tail.rfind(b"PK\x05\x06")
    while start >= 0:
        end = tail[start : start + 22]
        if len(end) == 22 and len(tail) - start - 22 == struct.unpack("<H", end[20:])[0]:
            return _has_directory(stream, size - (len(tail) - start), *struct.unpack("<II", end[12:20]))
        start = tail.rfind(b"PK\x05\x06", 0, start)
    return False


def _has_directory(stream: BinaryIO, end: int, length: int, offset: int) -> bool:
    for position in (end - length, offset):
        if 0 <= position < end:
            stream.seek(position)
            if stream.read(4) in {b"PK\x01\x02", b"PK\x06\x06"}:
                return True
    return False


def _is_pickle(head: bytes, size: int) -> bool:
    """Protocols 2 and later announce themselves; 0 and 1 are read opcode by opcode, without running any."""
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        return True
    count = 0
    try:
        for opcode, _, _ in pickletools.genops(io.BytesIO(head)):
            count += 1
            if opcode.name == "STOP":
                return True
    except Exception:  # the disassembler meets hostile bytes here and raises whatever it likes
        return size > len(head) and count > 64
    return False


def _text(head: bytes, *, whole: bool) -> str:
    if b"\x00" in head:
        return "unknown"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # A character may be cut in two at the end of the window.
        if whole or error.start < len(head) - 4:
            return "unknown"
        text = head[: error.start].decode()
    return "json" if text.lstrip()[:1] in {"{", "["} else "text"
