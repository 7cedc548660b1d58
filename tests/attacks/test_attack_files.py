"""Hostile model, plan and weight files: refused with exit code 3, and nothing in them ever runs."""

from __future__ import annotations

import io
import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import hostile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import FileRefusedError, SecateurError
from secateur.files import load_json, load_metadata, load_tensors, save_tensors, sniff
from secateur.files.paths import check_name, open_inside
from secateur.recipe import load_recipe

MARK = Path("/nonexistent/mark")


def ids(case):
    return case[0] if isinstance(case, tuple) else None


def refused(path: Path) -> list[str]:
    """Try every reader; all of them must refuse. Returns what they said."""
    said = []
    for read in (load_tensors, load_metadata, load_json):
        with pytest.raises(FileRefusedError) as error:
            read(path)
        assert error.value.exit_code == 3
        said.append(str(error.value))
    return said


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", hostile.PICKLE_NAMES)
def test_pickles_under_every_name(tmp_path, name):
    mark = tmp_path / "mark"
    for kind, data in hostile.pickles(mark):
        path = tmp_path / name
        path.write_bytes(data)
        assert sniff(path) == "pickle", kind
        assert all("pickle can run any code" in text for text in refused(path)), kind
        with pytest.raises(SecateurError):
            load_recipe(path)
        assert not mark.exists()


def test_the_bombs_do_explode_when_unpickled(tmp_path):
    import pickle

    mark = tmp_path / "mark"
    for _, data in hostile.pickles(mark):
        pickle.loads(data)
        assert mark.exists()
        mark.unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "x"])
def test_archives_under_every_name(tmp_path, name):
    for kind, data in hostile.containers(tmp_path / "mark"):
        path = tmp_path / name
        path.write_bytes(data)
        assert sniff(path) == kind
        assert all("archive" in text or "compressed" in text for text in refused(path)), kind
        with pytest.raises(FileRefusedError):
            load_recipe(path)


def test_what_torch_saves_is_refused(tmp_path):
    for new in (True, False):
        torch.save({"w": torch.ones(3)}, tmp_path / "x", _use_new_zipfile_serialization=new)
        assert sniff(tmp_path / "x") == ("torch" if new else "pickle")
        assert "weights_only=True" in refused(tmp_path / "x")[0]


@pytest.mark.parametrize("place", ["behind", "inside a tensor"])
def test_polyglot_of_safetensors_and_zip(tmp_path, place):
    """Zips are read from their end: a file can be a good safetensors and a torch archive at once."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", next(hostile.pickles(MARK))[1])
    payload = buffer.getvalue()
    inner = hostile.entry(0, len(payload), [len(payload)], "U8")
    data = hostile.raw({"a": inner}, payload) if "inside" in place else hostile.raw({}, payload)
    (tmp_path / "x.safetensors").write_bytes(data)
    assert zipfile.is_zipfile(tmp_path / "x.safetensors")
    assert all("archive" in text for text in refused(tmp_path / "x.safetensors"))


def test_polyglot_of_json_and_zip(tmp_path):
    buffer = io.BytesIO(b'{"a": 1}\n')
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("x", "y")
    (tmp_path / "plan.json").write_bytes(buffer.getvalue())
    refused(tmp_path / "plan.json")


def test_random_weights_that_hold_the_zip_mark_are_no_zip(tmp_path):
    weights = torch.frombuffer(bytearray(b"PK\x05\x06" * 400), dtype=torch.uint8)
    save_tensors(tmp_path / "x", {"w": weights})
    assert torch.equal(load_tensors(tmp_path / "x")["w"], weights)


@pytest.mark.parametrize("case", list(hostile.lies()), ids=ids)
def test_lies_in_a_safetensors_header(tmp_path, case):
    (tmp_path / "x.safetensors").write_bytes(case[1])
    with pytest.raises(FileRefusedError):
        load_tensors(tmp_path / "x.safetensors")


def test_the_lies_differ_from_a_good_file_by_the_lie_alone(tmp_path):
    (tmp_path / "x").write_bytes(hostile.raw({"a": hostile.entry(0, 4)}, bytes(4)))
    assert torch.equal(load_tensors(tmp_path / "x")["a"], torch.zeros(1))
    aliased = {"__metadata__": {"secateur.aliases": '{"b":"a"}'}, "a": hostile.entry(0, 4)}
    (tmp_path / "x").write_bytes(hostile.raw(aliased, bytes(4)))
    assert set(load_tensors(tmp_path / "x")) == {"a", "b"}


def test_truncated_at_every_byte(tmp_path):
    path = tmp_path / "x"
    save_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(FileRefusedError):
            load_tensors(path)
    path.write_bytes(data + b"\x00")
    with pytest.raises(FileRefusedError, match="extra bytes"):
        load_tensors(path)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_in_the_header_is_refused_or_seen_by_the_hash(tmp_path, every):
    path = tmp_path / "x"
    digest = save_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)})
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    for bit in range(0, 8 * size, every):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(FileRefusedError):
            load_tensors(path, sha256=digest)
        with suppress(FileRefusedError):
            load_tensors(path)


@pytest.mark.parametrize("case", list(hostile.bad_json()), ids=ids)
def test_bad_json(tmp_path, case):
    (tmp_path / "x.json").write_bytes(case[1])
    with pytest.raises(FileRefusedError, match="refused"):
        load_json(tmp_path / "x.json")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda b: hostile.raw(b"{" + b + b"}")))
def test_any_bytes_only_raise_our_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("f") / "x"
    path.write_bytes(data)
    assert sniff(path)
    for read in (load_tensors, load_json, load_metadata):
        with suppress(FileRefusedError):
            read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=3) | st.just("F32"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3), st.binary(max_size=12))
def test_any_header_only_raises_our_errors(tmp_path_factory, header, payload):
    path = tmp_path_factory.mktemp("f") / "x"
    path.write_bytes(hostile.raw(header, payload))
    try:
        read = load_tensors(path)
    except FileRefusedError:
        return
    assert sum(t.numel() * t.element_size() for t in read.values()) == len(payload)


def test_hostile_names_cannot_write_to_the_terminal(tmp_path):
    header = {"\x1b[31m\nok": hostile.entry(0, 3)}
    (tmp_path / "x").write_bytes(hostile.raw(header, bytes(4)))
    with pytest.raises(FileRefusedError) as error:
        load_tensors(tmp_path / "x")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", hostile.BAD_NAMES, ids=lambda name: ascii(name[:20]))
def test_names_that_leave_the_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "x").write_text("{}")
    with pytest.raises(FileRefusedError):
        check_name(name)
    with pytest.raises(FileRefusedError):
        load_json(name, within=tmp_path / "in")


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "x.json").write_text("{}")
    (inside / "file.json").symlink_to(outside / "x.json")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    os.link(outside / "x.json", inside / "hard.json")
    (inside / "real").mkdir()
    (inside / "real" / "x.json").write_text('{"ok": 1}')
    for name in ("file.json", "folder/x.json", "loop", "hard.json", "real", "missing.json", "real/x.json/y"):
        with pytest.raises(FileRefusedError):
            load_json(name, within=inside)
    assert load_json("real/x.json", within=inside) == {"ok": 1}
    with open_inside(inside, "real/x.json") as stream:
        assert json.load(stream) == {"ok": 1}


def test_no_descriptor_leaks_from_refusals(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "x").write_bytes(b"junk")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        for name in ("link/x", "missing", "x", "../x"):
            with pytest.raises(FileRefusedError):
                load_tensors(name, within=tmp_path)
        with pytest.raises(FileRefusedError):
            load_tensors(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_pipes_and_devices_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (sniff, load_json, load_tensors, load_recipe):
            with pytest.raises(FileRefusedError, match="ordinary file"):
                read(path)
    with pytest.raises(FileRefusedError):
        load_json("pipe", within=tmp_path)
