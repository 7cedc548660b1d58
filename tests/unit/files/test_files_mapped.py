"""Tensors that stay in their file: numbers across words, truth values, room, and what is written in place."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from secateur.errors import FileRefusedError
from secateur.files import load_tensors
from secateur.files.in_place import MappedTensors
from secateur.files.mapped import map_file

NUMBERS = [1.5, -2.0, 3.25]


def written(path: Path, *, before: int = 0, truth: int = 1) -> Path:
    """A file by hand: some bytes, three numbers and a truth value behind each other."""
    parts = {"bytes": ("U8", before, b"\7" * before), "floats": ("F32", 3, struct.pack("<3f", *NUMBERS)),
             "truth": ("BOOL", 1, bytes([truth]))}  # fmt: skip
    header, body = {}, b""
    for name, (dtype, size, data) in parts.items():
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize("before", [0, 1, 3, 4])
def test_numbers_across_words_are_read_and_are_not_changed_in_place(before: int, tmp_path: Path) -> None:
    path = written(tmp_path / "w", before=before)
    found = map_file(path)
    assert found["floats"].tolist() == NUMBERS
    assert found["floats"].data_ptr() % 4 == 0, "no processor has to read across a word"
    assert found["bytes"].tolist() == [7] * before
    if before % 4:
        with pytest.raises(FileRefusedError, match="odd byte"):
            MappedTensors(path)
        return
    held = MappedTensors(path)
    held.tensors["floats"][1] = 8.0
    held.flush()
    held.release()
    assert load_tensors(path)["floats"].tolist() == held.tensors["floats"].tolist() == [1.5, 8.0, 3.25]


def test_truth_values_other_than_two_and_files_without_room_are_refused(tmp_path: Path) -> None:
    assert map_file(written(tmp_path / "w"), max_bytes=13)["truth"].tolist() == [True]
    with pytest.raises(FileRefusedError):
        map_file(tmp_path / "w", max_bytes=12)
    with pytest.raises(FileRefusedError, match="truth values"):
        map_file(written(tmp_path / "w", truth=2))
    assert torch.equal(map_file(written(tmp_path / "w", truth=0))["truth"], torch.tensor([False]))
