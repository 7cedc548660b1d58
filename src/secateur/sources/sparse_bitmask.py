"""Checkpoints in the layout `sparse-bitmask`, which its own library no longer reads: dense tensors out of masks.

A weight W stands there as W.shape, W.bitmask (one bit per number, the first in the lowest bit, each row filled up to
whole bytes), W.compressed (the numbers that are there, row by row) and W.row_offsets (where each row starts in them).

Source: the layout of compressed-tensors before version 0.15 and of sparseml, as their files show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import FileRefusedError
from secateur.files.header import Header, header_length, parse_header
from secateur.files.safe import load_tensors
from secateur.files.sniff import open_regular

PARTS = ("shape", "compressed", "bitmask", "row_offsets")
_QUANTISED = ("scale", "zero_point", "g_idx", "weight_packed")


def is_sparse_bitmask(folder: str | Path) -> bool:
    """Whether a folder's safetensors files hold weights in this layout; only their headers are read."""
    return any(entry.name.endswith(".bitmask") for path in _files(folder) for entry in header_of(path).entries)


def read_sparse_bitmask(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of such a checkpoint, dense.

    Args:
        folder: with one or several safetensors files.

    Returns:
        name -> tensor, ready for `load_state_dict`.

    Raises:
        FileRefusedError: a file is damaged, a weight's parts do not fit each other, a name is there twice, or the
            weights are quantised as well.

    Cost: memory for the dense tensors, which are at most eight times as many numbers as the masks have bytes.
    """
    found: dict[str, Tensor] = {}
    for path in _files(folder):
        read = load_tensors(path)
        twice = found.keys() & read.keys()
        if twice:
            raise FileRefusedError(f"{path} is refused: {min(twice)[:80]!a} stands in another file as well")
        found |= read
    odd = [name for name in found if name.rpartition(".")[2].endswith(_QUANTISED)]
    if odd:
        raise FileRefusedError(
            f"{folder} is refused: its weights are quantised as well as sparse ({min(odd)[:80]!a})",
            why="only the layout sparse-bitmask of plain numbers is read",
        )
    masks = [name.removesuffix(".bitmask") for name in found if name.endswith(".bitmask")]
    for name in masks:
        found[name] = _dense({part: found.pop(f"{name}.{part}", None) for part in PARTS}, name, folder)
    return dict(sorted(found.items()))


def _dense(parts: Mapping[str, Tensor | None], name: str, folder: str | Path) -> Tensor:
    def refused(why: str) -> FileRefusedError:
        return FileRefusedError(f"the weight {name[:80]!a} in {folder} is refused", why=why, hint="get the file again")

    shape, values, mask = parts["shape"], parts["compressed"], parts["bitmask"]
    if shape is None or values is None or mask is None:
        lost = [part for part, tensor in parts.items() if tensor is None and part != "row_offsets"]
        raise refused(f"it has no {' and no '.join(lost)}")
    sizes = [int(size) for size in shape.reshape(-1).tolist()] if not shape.is_floating_point() else []
    if not sizes or min(sizes) < 0 or mask.dtype != torch.uint8 or values.dim() != 1:
        raise refused("its parts have other shapes or dtypes than the layout")
    rows, columns = prod(sizes[:-1]), sizes[-1]
    # Held against the bytes that are there before memory is asked for.
    if mask.numel() != rows * -(-columns // 8):
        raise refused(f"its mask has {mask.numel()} bytes, which is none of the shape {sizes}")
    raw = np.unpackbits(mask.reshape(rows, -1).numpy(), axis=1, bitorder="little")
    if raw[:, columns:].any():
        raise refused("its mask marks numbers behind the ends of rows")
    kept = torch.from_numpy(raw[:, :columns].astype(np.bool_))
    counts = kept.sum(1)
    if int(counts.sum()) != len(values):
        raise refused(f"its mask counts {int(counts.sum())} numbers, and {len(values)} are there")
    starts = parts["row_offsets"]
    # They follow from the mask; where they are there and do not, one of the two is damaged.
    if starts is not None and not torch.equal(starts.reshape(-1).long(), counts.cumsum(0) - counts):
        raise refused("its row offsets are not those of its mask")
    dense = torch.zeros(rows, columns, dtype=values.dtype)
    dense[kept] = values
    return dense.reshape(sizes)


def _files(folder: str | Path) -> list[Path]:
    return sorted(path for path in Path(folder).iterdir() if path.suffix == ".safetensors")


def header_of(path: Path) -> Header:
    """The header of a safetensors file, checked; no tensor is read.

    Raises:
        FileRefusedError: no such file.
    """
    with open_regular(path) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        length = header_length(stream.read(8), size=size, origin=str(path))
        return parse_header(stream.read(length), payload=size - 8 - length, origin=str(path))
