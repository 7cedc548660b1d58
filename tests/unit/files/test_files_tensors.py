from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch as library
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import FileRefusedError, InputError
from secateur.files import load_json, load_metadata, load_tensors, save_tensors, sniff
from secateur.files.header import ITEM_SIZE
from secateur.files.safe import dtype_names

DTYPES = sorted(dtype_names(), key=str)


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    numbers = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator)
    return (numbers + 1j * numbers).to(dtype) if dtype.is_complex else numbers.to(dtype)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    raw = [torch.view_as_real(t) if t.is_complex() else t for t in (first, second)]
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in raw]
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*raw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 1, 3)], ids=str)
def test_round_trip_and_the_library_agree(tmp_path, dtype, shape):
    tensors = {"a": sample(dtype, shape), "b.weight": torch.arange(3.0), "c": torch.tensor([True])}
    path = tmp_path / "x.safetensors"
    digest = save_tensors(path, tensors)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for read in (load_tensors(path, sha256=digest), library.load_file(path)):
        assert list(sorted(read)) == ["a", "b.weight", "c"]
        assert all(same(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_of_the_library_are_read(tmp_path, dtype):
    tensors = {"a": sample(dtype, (4, 3)), "b": sample(torch.uint8, (5,))}
    library.save_file(tensors, tmp_path / "x", metadata={"format": "pt", "who": "library"})
    read = load_tensors(tmp_path / "x")
    assert all(same(read[name], tensors[name]) for name in tensors)
    assert load_metadata(tmp_path / "x") == {"format": "pt", "who": "library"}


def test_item_sizes_are_those_of_torch():
    assert {name: dtype.itemsize for dtype, name in dtype_names().items()} == ITEM_SIZE


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_any_names_shapes_and_metadata(tmp_path_factory, spec, metadata):
    path = tmp_path_factory.mktemp("t") / "x"
    tensors = {name: sample(dtype, tuple(shape)) for name, (dtype, shape) in spec.items() if name != "__metadata__"}
    save_tensors(path, tensors, metadata)
    read = load_tensors(path)
    assert list(read) == sorted(tensors)
    assert all(same(read[name], tensors[name]) for name in tensors)
    assert load_metadata(path) == {"format": "pt", **metadata}
    assert set(library.load_file(path)) == set(tensors)


def test_strides_conjugates_and_gradients_do_not_matter(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "t": base.t(),
        "slice": base[:, ::2],
        "expanded": torch.ones(1).expand(5),
        "grad": torch.nn.Parameter(torch.ones(2)),
        "conj": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
        "channels_last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    }
    save_tensors(tmp_path / "x", tensors)
    read = load_tensors(tmp_path / "x")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert all(t.is_contiguous() and not t.requires_grad for t in read.values())
    read["slice"].add_(1)
    assert torch.equal(base, torch.arange(12.0).reshape(3, 4))


def test_ties_are_stored_once_and_come_back_tied(tmp_path):
    weight = torch.randn(50, 20)
    tensors = {
        "head.weight": weight,
        "embed.weight": weight,
        "view": weight.view(20, 50),
        "part": weight[:10],
    }
    save_tensors(tmp_path / "x", tensors)
    assert sorted(library.load_file(tmp_path / "x")) == ["embed.weight", "part", "view"]
    read = load_tensors(tmp_path / "x")
    assert read["head.weight"] is read["embed.weight"]
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert load_metadata(tmp_path / "x") == {"format": "pt"}


def test_a_square_weight_and_its_transpose_are_no_tie(tmp_path):
    """Same address, shape and dtype: only the strides tell them apart."""
    weight = torch.arange(9.0).reshape(3, 3)
    save_tensors(tmp_path / "x", {"a": weight, "b": weight.t(), "c": weight})
    loaded = load_tensors(tmp_path / "x")
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], weight.t())
    assert loaded["c"] is loaded["a"]
    assert set(library.load_file(tmp_path / "x")) == {"a", "b"}


def test_empty_tensors_are_never_tied(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.empty(0), "b": torch.empty(0, 3), "c": torch.empty(0)})
    read = load_tensors(tmp_path / "x")
    assert {name: tuple(t.shape) for name, t in read.items()} == {"a": (0,), "b": (0, 3), "c": (0,)}
    assert read["a"] is not read["c"]


def test_the_bytes_are_the_same_in_every_process(tmp_path):
    code = (
        "import sys, torch; from secateur.files import save_tensors; w = torch.arange(6.);"
        "print(save_tensors(sys.argv[1], {'b': w, 'a': torch.ones(2, dtype=torch.half), 'c': w},"
        "{str(i): 'x' for i in range(9)}))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"  # any other than here
    argv, environment = [sys.executable, "-c", code, str(tmp_path / "x")], {"PYTHONHASHSEED": seed}
    there = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
    w = torch.arange(6.0)
    tensors = {"b": w, "a": torch.ones(2, dtype=torch.half), "c": w}
    assert there.strip() == save_tensors(tmp_path / "y", tensors, {str(i): "x" for i in range(9)})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.ones(3, dtype=torch.complex128),
    ],
    ids=["sparse", "meta", "complex128"],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, tensor):
    with pytest.raises(InputError, match=r"'layer\.w' cannot be saved"):
        save_tensors(tmp_path / "x", {"a": torch.ones(1), "layer.w": tensor})
    assert list(tmp_path.iterdir()) == []


def test_reserved_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="reserved"):
        save_tensors(tmp_path / "x", {"__metadata__": torch.ones(1)})
    with pytest.raises(InputError, match="reserved"):
        save_tensors(tmp_path / "x", {}, {"secateur.aliases": "{}"})


def test_a_flipped_bit_in_a_tensor_is_seen_with_the_hash(tmp_path):
    path = tmp_path / "x"
    digest = save_tensors(path, {"a": torch.ones(8)})
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert not torch.equal(load_tensors(path)["a"], torch.ones(8))
    with pytest.raises(FileRefusedError, match="SHA-256"):
        load_tensors(path, sha256=digest)
    with pytest.raises(FileRefusedError, match="SHA-256"):
        load_tensors(path, sha256="0" * 64)


def test_load_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2.5, "é", null, true], "b": {}}')
    assert load_json(path) == {"a": [1, 2.5, "é", None, True], "b": {}}
    assert load_json("x.json", within=tmp_path)["b"] == {}
    with pytest.raises(FileRefusedError, match="larger than 10 bytes"):
        load_json(path, max_bytes=10)
    with pytest.raises(FileRefusedError, match="deeper than 1 "):
        load_json(path, max_depth=1)
    assert load_json(path, max_depth=2, max_bytes=path.stat().st_size)


def test_missing_files_and_folders_are_refused(tmp_path):
    for read in (load_json, load_tensors, load_metadata, sniff):
        with pytest.raises(FileRefusedError, match="No such file"):
            read(tmp_path / "none")
        with pytest.raises(FileRefusedError, match="ordinary file"):
            read(tmp_path)


def test_sniff_plain_kinds(tmp_path):
    cases = {
        b"": "empty",
        b"hello\n": "text",
        b' {"a": 1}': "json",
        b"[]": "json",
        b"\xff\xfe\x00x": "unknown",
        b"GGUF\x03\x00\x00\x00": "gguf",
        json.dumps({"a": "é" * 40_000}, ensure_ascii=False).encode(): "json",
    }
    for data, kind in cases.items():
        (tmp_path / "x").write_bytes(data)
        assert sniff(tmp_path / "x") == kind
    save_tensors(tmp_path / "x", {"a": torch.ones(2)})
    assert sniff(tmp_path / "x") == "safetensors"


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x1F8B & ~7, 0x8B1F, 0x2123])
def test_a_header_whose_length_looks_like_a_signature_is_still_read(tmp_path, length):
    body = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + body.ljust(length) + b"\x01\x02")
    assert load_tensors(tmp_path / "x")["a"].tolist() == [1, 2]
