"""The manifest: what it lists, what it refuses, and when a folder is ours as a whole."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from secateur.errors import FileRefusedError
from secateur.files import publish_dir
from secateur.files.manifest import foreign, read_manifest, require_files, seal
from secateur.files.parse import parse_json


@pytest.fixture
def ours(tmp_path) -> Path:
    with publish_dir(tmp_path / "out") as folder:
        (folder / "report.json").write_text("{}")
        (folder / "deep" / "deeper").mkdir(parents=True)
        (folder / "deep" / "deeper" / "data").write_bytes(bytes(3_000_000))
    return tmp_path / "out"


def test_every_published_folder_lists_its_files(ours):
    assert read_manifest(ours) == {
        "report.json": sha256(b"{}").hexdigest(),
        "deep/deeper/data": sha256(bytes(3_000_000)).hexdigest(),
    }
    require_files(ours, read_manifest(ours))
    assert foreign(ours) == ""


def test_a_manifest_that_is_there_is_not_written_again(tmp_path):
    (tmp_path / "x").write_text("x")
    (tmp_path / "manifest.json").write_text("mine")
    seal(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "mine"


@pytest.mark.parametrize("place", ["x", "deep/x", "deep/deeper/x"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_whatever_is_not_listed_is_foreign_at_any_depth(ours, place, kind):
    path = ours / place
    if kind == "link":
        path.symlink_to(ours / "report.json")
    else:
        path.mkdir() if kind == "folder" else path.write_text("x")
    assert f"holds '{place}'" in foreign(ours)
    assert f"holds '{place}'" in foreign(ours, hashes=False)


def test_what_is_listed_must_be_there_and_unchanged(ours):
    data = ours / "deep" / "deeper" / "data"
    data.write_bytes(bytes(2_999_999) + b"x")
    assert "was changed" in foreign(ours)
    assert foreign(ours, hashes=False) == ""
    data.unlink()
    assert "lacks 'deep/deeper/data'" in foreign(ours, hashes=False)


def test_an_empty_folder_is_nobodys(tmp_path):
    assert foreign(tmp_path) == ""


def test_folders_of_others_with_a_right_manifest_are_not_ours(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    seal(tmp_path)
    assert "no plan.json or report.json" in foreign(tmp_path)


def test_require_files_names_the_file(ours):
    with pytest.raises(FileRefusedError, match=r"report\.json"):
        require_files(ours, {"report.json": "0" * 64})


@pytest.mark.parametrize("depth", [1, 3, 64])
def test_json_may_nest_as_deep_as_is_said(depth):
    # Brackets inside of texts open nothing.
    for opening, closing, levels in (("[", "]", 1), ('{"a[{":', "}", 1), ('["]}",{"b\\"[":', "}]", 2)):
        count = max(depth // levels, 1)
        text = (opening * count + "1" + closing * count).encode()
        assert parse_json(text, origin="x", max_depth=count * levels) == json.loads(text)
        with pytest.raises(FileRefusedError, match="nests deeper"):
            parse_json(text, origin="x", max_depth=count * levels - 1)


def test_json_of_too_many_values_is_refused_before_it_is_read():
    assert parse_json(b"[1,2,3]", origin="x", max_values=3) == [1, 2, 3]
    for data in (b"[1,2,3,4]", b"[[],[]]", b'{"a":1}'):
        with pytest.raises(FileRefusedError, match="more than 3 values"):
            parse_json(data, origin="x", max_values=3)
