"""The header of a GGUF file, walked once before a reader that believes every count meets it.

A file is the word GGUF, a version, two counts (tensors, fields), the fields, the tensors' names and places, and their
bytes. Source: format description in the ggml project, versions 2 and 3.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from secateur.errors import FileRefusedError
from secateur.files.header import corrupt
from secateur.files.sniff import open_regular, refuse, sniff_stream

MOST_FIELDS, MOST_TENSORS, MOST_ITEMS = 4096, 100_000, 1 << 22
LONGEST_TEXT = 1 << 24
# Number of a kind of value -> its bytes; texts and lists have lengths of their own.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, LIST = 8, 9
MOST_DIMS = 4


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose counts and lengths its bytes do not bear.

    Args:
        path: the file; no tensor is read.

    Raises:
        FileRefusedError: it is no ordinary file, another kind of file, or lies about its own size.

    Cost: one pass over the fields, which are some megabytes.
    """
    with open_regular(path) as stream:
        if (kind := sniff_stream(stream)) != "gguf":
            raise refuse(path, kind, wanted="gguf")
        _Walk(stream, str(path)).file()


class _Walk:
    """A stream that is read in order, with every length held against what is left."""

    def __init__(self, stream: BinaryIO, origin: str) -> None:
        self.stream, self.origin = stream, origin
        self.size = stream.seek(0, os.SEEK_END)
        stream.seek(0)

    def file(self) -> None:
        self.skip(4, "its first word")
        version = self.number("<I", "a version")
        if version not in (2, 3):
            raise FileRefusedError(f"{self.origin} is refused: GGUF version {version}", why="versions 2 and 3 are read")
        tensors, fields = self.number("<Q", "a count of tensors"), self.number("<Q", "a count of fields")
        if tensors > MOST_TENSORS or fields > MOST_FIELDS:
            raise corrupt(self.origin, f"it claims {tensors} tensors and {fields} fields")
        for _ in range(fields):
            self.text("the name of a field")
            self.value(self.number("<I", "a kind of value"))
        for _ in range(tensors):
            self.text("the name of a tensor")
            dims = self.number("<I", "a count of dimensions")
            if dims > MOST_DIMS:
                raise corrupt(self.origin, f"a tensor has {dims} dimensions")
            self.skip(8 * dims + 4 + 8, "the shape of a tensor")

    def value(self, kind: int) -> None:
        if kind == TEXT:
            self.text("a text")
        elif kind == LIST:
            inner, count = self.number("<I", "a kind of value"), self.number("<Q", "the length of a list")
            # Lists of lists are allowed by the format and used by nobody: a way to hide endless work.
            if count > MOST_ITEMS or inner == LIST:
                raise corrupt(self.origin, f"a list of {count} values of kind {inner}")
            if inner != TEXT:
                self.skip(count * self.width(inner), "a list")
                return
            for _ in range(count):
                self.text("a text of a list")
        else:
            self.skip(self.width(kind), "a value")

    def width(self, kind: int) -> int:
        if kind not in SIZES:
            raise corrupt(self.origin, f"a value has the unknown kind {kind}")
        return SIZES[kind]

    def text(self, what: str) -> None:
        length = self.number("<Q", what)
        if length > LONGEST_TEXT:
            raise corrupt(self.origin, f"{what} has {length} bytes")
        self.skip(length, what)

    def number(self, form: str, what: str) -> int:
        found = self.stream.read(struct.calcsize(form))
        if len(found) < struct.calcsize(form):
            raise corrupt(self.origin, f"it ends within {what}")
        return int(struct.unpack(form, found)[0])

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.stream.tell():
            raise corrupt(self.origin, f"it ends within {what}")
        self.stream.seek(count, os.SEEK_CUR)
