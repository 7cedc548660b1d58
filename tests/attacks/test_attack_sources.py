"""Model folders and data of others: no code of theirs runs, no other program starts, nothing hangs."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path

import folders
import hostile
import numpy as np
import pytest
from torch import nn
from watch import refused

# -- model folders of others -------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from secateur.files import save_tensors

    folder = tmp_path_factory.mktemp("bert")
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    save_tensors(folder / "model.safetensors", {name: t.contiguous() for name, t in model.state_dict().items()})
    config = {"model_type": "bert", **SIZES, "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def taken(bert: Path, here: Path) -> Path:
    """A copy of a good model folder with code in it that leaves a mark when it is run."""
    folder = here / "model"
    folder.mkdir()
    for path in bert.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    code = f"open({str(here / 'CANARY')!r}, 'w').close()\n"
    for name in ("evil.py", "pipeline.py", "modeling_bert.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    return folder


def resolve(folder: Path) -> object:
    from secateur.sources import resolve_model

    return resolve_model(f"hf:{folder}")


def test_the_good_model_folder_is_good(bert, tmp_path):
    assert sum(p.numel() for p in resolve(taken(bert, tmp_path)).model.parameters()) > 1000
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(("name", "more"), list(folders.configs()), ids=[name for name, _ in folders.configs()])
def test_configs_that_ask_for_code_or_time(bert, tmp_path, capfd, monkeypatch, name, more):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))  # whoever asks is told yes
    folder = taken(bert, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    refused(lambda: resolve(folder), tmp_path, capfd)


@pytest.mark.parametrize(
    ("name", "file", "content"), list(folders.other_configs()), ids=[name for name, *_ in folders.other_configs()]
)
def test_other_files_that_ask_for_code(bert, tmp_path, capfd, monkeypatch, name, file, content):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    folder = taken(bert, tmp_path)
    (folder / file).write_text(json.dumps(content))
    refused(lambda: resolve(folder), tmp_path, capfd)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("what", ["a pipe", "a device", "a link to itself"])
def test_model_folders_with_things_that_are_no_files(bert, tmp_path, capfd, file, what):
    folder = taken(bert, tmp_path)
    (folder / file).touch()
    folders._becomes(folder / file, what, tmp_path)
    refused(lambda: resolve(folder), tmp_path, capfd)


@pytest.mark.parametrize("data", [pair[1] for pair in hostile.bad_json()], ids=[name for name, _ in hostile.bad_json()])
def test_configs_that_are_no_json(bert, tmp_path, capfd, data):
    folder = taken(bert, tmp_path)
    (folder / "config.json").write_bytes(data)
    refused(lambda: resolve(folder), tmp_path, capfd)


def test_weights_as_pickle_are_not_taken(bert, tmp_path, capfd):
    folder = taken(bert, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(next(hostile.pickles(tmp_path / "CANARY"))[1])
    refused(lambda: resolve(folder), tmp_path, capfd)


def test_only_files_of_the_folder_are_copied_into_an_output(bert, tmp_path):
    """A link that is called like a tokenizer would bring a private file into a folder that is published."""
    from secateur.integrations.transformers import copy_tokenizer

    (tmp_path / "secret").write_text("secret")
    folder = taken(bert, tmp_path)
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    (folder / "vocab.txt").write_text("[PAD]")
    (folder / "merges.txt").symlink_to(folder / "vocab.txt")
    model = nn.Module()
    model.config = type("Config", (), {"_name_or_path": str(folder)})()
    (tmp_path / "copy").mkdir()
    assert copy_tokenizer(model, tmp_path / "copy") == ["merges.txt", "vocab.txt"]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["merges.txt", "vocab.txt"]


# -- data of others ----------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A folder of classes, and programs that leave a mark in the places of those that Pillow starts."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c", "djpeg", "xv", "display"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path / 'CANARY'}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path


def data_of(word: str) -> object:
    from secateur.sources import resolve_data

    return resolve_data(word)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name, _ in folders.images()])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_images_of_other_formats(pictures, capfd, name, suffix):
    data_of(f"folder:{pictures / 'data'}")  # as it is, it is good
    (pictures / "data" / "a" / f"x{suffix}").write_bytes(dict(folders.images())[name])
    refused(lambda: data_of(f"folder:{pictures / 'data'}"), pictures, capfd)


@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder", "a link to itself"])
def test_images_that_are_no_files(pictures, capfd, what):
    folders._becomes(pictures / "data" / "a" / "0.png", what, pictures)
    refused(lambda: data_of(f"folder:{pictures / 'data'}"), pictures, capfd)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name, _ in folders.images()])
def test_images_in_parquet(pictures, capfd, name):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"bytes": dict(folders.images())[name], "path": None}] * 4
    parquet.write_table(pyarrow.table({"image": rows, "label": [0, 1, 0, 1]}), pictures / "x.parquet")
    refused(lambda: data_of(f"parquet:{pictures / 'x.parquet'}"), pictures, capfd)


def npz_claims(path: Path, shape: str, *, data: bytes = b"", compress: bool = False) -> None:
    """An archive whose only array says whatever one wants of itself."""
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    text = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name in ("x.npy", "y.npy"):
            archive.writestr(name, text)


@pytest.mark.parametrize("kind", ["objects", "a petabyte", "negative", "code", "one array", "text", "pickle", "a pipe"])
def test_arrays(tmp_path, capfd, kind):
    path = tmp_path / "x.npz"
    if kind == "objects":
        np.savez(path, x=np.array([hostile.Bomb(tmp_path / "CANARY")], dtype=object), y=np.zeros(1))
    elif kind in {"a petabyte", "negative", "code"}:
        npz_claims(path, {"a petabyte": "(2**10, )", "negative": "(-5,)", "code": "(__import__('os'),)"}[kind])
        if kind == "a petabyte":
            npz_claims(path, f"({2**48},)")
    elif kind == "one array":
        with path.open("wb") as stream:
            np.save(stream, np.zeros(3))
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"hello" if kind == "text" else next(hostile.pickles(tmp_path / "CANARY"))[1])
    refused(lambda: data_of(f"npz:{path}"), tmp_path, capfd)


@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder"])
def test_text_that_is_no_file(tmp_path, capfd, what):
    from secateur.sources.text import load_text

    (tmp_path / "x.txt").write_text("x")
    folders._becomes(tmp_path / "x.txt", what, tmp_path)
    refused(lambda: load_text(tmp_path / "x.txt", tokenizer=lambda text: {"input_ids": [1] * 500}), tmp_path, capfd)
