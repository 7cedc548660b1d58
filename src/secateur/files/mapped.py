"""Tensors that stay in their file: the pages of a safetensors file are the memory of its tensors.

Several processes that load the same file share its pages, and a page is read when something first uses it. The mapping
is private: what a program writes to such a tensor stays with the program, and the file as it is.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.files.header import Entry, Header, corrupt, header_length, parse_header
from secateur.files.safe import dtypes, require_hash, require_room, tied_again
from secateur.files.sniff import open_regular, refuse, sniff_stream

if TYPE_CHECKING:
    from torch import Tensor


def map_file(
    path: str | Path, *, sha256: str | None = None, within: str | Path | None = None, max_bytes: int | None = None
) -> dict[str, Tensor]:
    """As `load_tensors`, without a copy: the tensors are pages of the file.

    What was hashed is what is mapped, by one descriptor. A file that somebody writes to in place afterwards changes the
    tensors that were not touched yet, and one that is cut off ends the process when a lost page is used: exchange
    files by renaming, as everything here does.

    Args:
        path: as for `load_tensors`.
        sha256: as for `load_tensors`.
        within: as for `load_tensors`.
        max_bytes: as for `load_tensors`.

    Returns:
        name -> tensor; they may be written to, which copies the pages that are written.

    Raises:
        FileRefusedError: as `load_tensors`.

    Cost: with `sha256` one pass over the file; no memory beside the system's own copy of it.
    """
    path, folder = Path(path), None if within is None else Path(within)
    with open_regular(path, within=folder) as stream:
        kind = sniff_stream(stream)
        if kind != "safetensors":
            raise refuse(path, kind, wanted="safetensors")
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    start, header = _header(pages, path)
    require_room(header, max_bytes, path)
    require_hash(str(path), None if sha256 is None else hashlib.sha256(pages).hexdigest(), sha256)
    return tied_again({entry.name: _tensor(pages, start, entry, path) for entry in header.entries}, header, path)


def _header(pages: mmap.mmap, path: Path) -> tuple[int, Header]:
    length = header_length(pages[:8], size=len(pages), origin=str(path))
    start = 8 + length
    return start, parse_header(pages[8:start], payload=len(pages) - start, origin=str(path))


def _tensor(pages: mmap.mmap, start: int, entry: Entry, path: Path) -> Tensor:
    import torch

    dtype = dtypes()[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    count = (entry.end - entry.begin) // dtype.itemsize
    # A bool byte other than 0 and 1 is undefined behaviour in the kernels that read it.
    if dtype == torch.bool:
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=count, offset=start + entry.begin)
        if int(raw.max()) > 1:
            raise corrupt(str(path), f"tensor {entry.name[:80]!a} holds truth values other than 0 and 1")
    if (start + entry.begin) % dtype.itemsize:
        # Other writers may leave numbers across words, which not every processor reads.
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=count * dtype.itemsize, offset=start + entry.begin)
        return raw.clone().view(dtype).reshape(entry.shape)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start + entry.begin).reshape(entry.shape)
