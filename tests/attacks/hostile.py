"""Generators of hostile files. Every pickle here leaves a mark on the disk when somebody runs it."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PICKLE_NAMES = (
    "model.safetensors",
    "model.bin",
    "model.pt",
    "model.pth",
    "plan.json",
    "report.json",
    "recipe.yaml",
    "weights",
)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def pickles(mark: Path) -> Iterator[tuple[str, bytes]]:
    """Every protocol, alone and inside a state dict; and an old text pickle as attackers write it by hand."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"protocol {protocol}", pickle.dumps(Bomb(mark), protocol=protocol)
        yield f"state dict {protocol}", pickle.dumps({"w": [1.0] * 50, "x": Bomb(mark)}, protocol=protocol)
    yield "by hand", f"cos\nmknod\n(S'{mark}'\ntR.".encode()
    yield "large", pickle.dumps([Bomb(mark), list(range(20_000))], protocol=0)


def containers(mark: Path) -> Iterator[tuple[str, bytes]]:
    """Archives with a pickle in them, by kind."""
    payload = pickle.dumps(Bomb(mark))
    for name in ("archive/data.pkl", "inner.bin"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(name, payload)
        yield ("torch" if "data.pkl" in name else "zip"), buffer.getvalue()
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        yield "tar", tar(payload, form)
    # The first tar programs wrote no magic word; only the checksum tells.
    old = bytearray(tar(payload, tarfile.USTAR_FORMAT))
    old[257:265] = bytes(8)
    old[148:156] = b" " * 8
    old[148:156] = f"{sum(old[:512]):06o}\0 ".encode()
    yield "tar", bytes(old)
    yield "gzip", gzip.compress(payload)
    yield "xz", lzma.compress(payload)
    yield "7z", b"7z\xbc\xaf\x27\x1c\x00\x04" + payload


def tar(payload: bytes, form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        info = tarfile.TarInfo("data.pkl")
        info.size = len(payload)
        archive.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def raw(header: object, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file that says whatever one wants."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def entry(begin: int, end: int, shape: object = (1,), dtype: object = "F32", **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def lies() -> Iterator[tuple[str, bytes]]:
    """Safetensors files, each with one lie."""
    good = {"a": entry(0, 4)}
    yield "empty file", b""
    yield "shorter than 8 bytes", b"\x10\x00\x00"
    yield "header length 0", (0).to_bytes(8, "little") + b"{}"
    yield "header longer than the file", raw(good, bytes(4), length=10_000)
    yield "header of 2**63", raw(good, bytes(4), length=2**63)
    yield "header of 2**64-1", raw(good, bytes(4), length=2**64 - 1)
    yield "header above the cap", raw(good, bytes(4), length=100_000_001)
    yield "header too short", raw(good, bytes(4), length=20)
    yield "header is a list", raw([1], b"")
    yield "header is no JSON", raw(b"{" + b"x" * 40)
    yield "header is not UTF-8", raw(b'{"\xff\xfe": 1}' + b" " * 8)
    yield "header with a BOM", raw(b"\xef\xbb\xbf" + json.dumps(good).encode(), bytes(4))
    yield "doubled tensor", raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4))
    yield "doubled field", raw(b'{"a":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,4]}}', bytes(4))
    yield "deep header", raw(b'{"a":' * 5000 + b"1" + b"}" * 5000)
    yield "deep list", raw(b'{"a":' + b"[" * 100_000)
    yield "NaN offset", raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}', bytes(4))
    yield "huge integer", raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4))
    yield "overlap", raw({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4))
    yield "part overlap", raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12))
    yield "hole", raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))
    yield "hole at the start", raw({"a": entry(4, 8)}, bytes(8))
    yield "bytes at the end", raw(good, bytes(5))
    yield "bytes without tensors", raw({}, bytes(4))
    yield "one byte missing", raw(good, bytes(3))
    yield "offsets backwards", raw({"a": entry(4, 0)}, bytes(4))
    yield "negative offset", raw({"a": entry(-4, 0)}, bytes(4))
    yield "offset beyond 2**64", raw({"a": entry(0, 2**64 + 4)}, bytes(4))
    yield "offsets as floats", raw({"a": entry(0.0, 4.0)}, bytes(4))
    yield "offsets as bools", raw({"a": entry(False, True, [1], "U8")}, bytes(1))
    yield "three offsets", raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, bytes(4))
    yield "shape needs more", raw({"a": entry(0, 4, [2])}, bytes(4))
    yield "shape needs less", raw({"a": entry(0, 4, [0])}, bytes(4))
    yield "dtype needs more", raw({"a": entry(0, 4, [1], "F64")}, bytes(4))
    yield "shape overflows", raw({"a": entry(0, 4, [2**32, 2**32, 2**32])}, bytes(4))
    yield "shape overflows behind a zero", raw({"a": entry(0, 0, [0, 2**62, 2**62])}, b"")
    yield "negative shape", raw({"a": entry(0, 4, [-1, -1])}, bytes(4))
    yield "shape as text", raw({"a": entry(0, 4, "1")}, bytes(4))
    yield "shape of bools", raw({"a": entry(0, 4, [True])}, bytes(4))
    yield "a thousand dimensions", raw({"a": entry(0, 4, [1] * 1000)}, bytes(4))
    yield "unknown dtype", raw({"a": entry(0, 4, [1], "PICKLE")}, bytes(4))
    yield "dtype is a list", raw({"a": entry(0, 4, [1], ["F32"])}, bytes(4))
    yield "extra field", raw({"a": entry(0, 4, code="import os")}, bytes(4))
    yield "missing field", raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4))
    yield "tensor is null", raw({"a": None}, b"")
    yield "metadata is a list", raw({"__metadata__": ["a"], **good}, bytes(4))
    yield "metadata holds numbers", raw({"__metadata__": {"a": 1}, **good}, bytes(4))
    yield "surrogate in a name", raw(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))
    yield "truth value 2", raw({"a": entry(0, 1, [1], "BOOL")}, b"\x02")
    for table in ({"b": "none"}, {"a": "a"}, {"b": 1}, ["a"], {"b": {"a": "a"}}):
        fields = {"__metadata__": {"secateur.aliases": json.dumps(table)}}
        yield f"alias table {table}", raw({**fields, **good}, bytes(4))
    yield "alias table is no JSON", raw({"__metadata__": {"secateur.aliases": "{"}, **good}, bytes(4))


def bad_json() -> Iterator[tuple[str, bytes]]:
    """JSON that a lax reader takes."""
    yield "NaN", b'{"a": NaN}'
    yield "infinity", b'{"a": [-Infinity]}'
    yield "infinity by size", b'{"a": 1e999}'
    yield "doubled key", b'{"safe": true, "safe": false}'
    yield "doubled key deep", b'[{"x": {"k": 1, "k": 1}}]'
    yield "deep lists", b"[" * 100_000 + b"]" * 100_000
    yield "deep objects", b'{"a":' * 100 + b"1" + b"}" * 100
    yield "open", b'{"a": [1, 2'
    yield "two documents", b"{} {}"
    yield "comment", b'{} // "x"'
    yield "trailing comma", b'{"a": 1,}'
    yield "single quotes", b"{'a': 1}"
    yield "huge integer", b"[" + b"9" * 10_000 + b"]"
    yield "not UTF-8", b'{"a": "\xff"}'
    yield "UTF-16", '{"a": 1}'.encode("utf-16")
    yield "BOM", b"\xef\xbb\xbf{}"
    yield "half a surrogate pair", b'{"a": "\\ud83d"}'
    yield "half a surrogate pair as key", b'{"\\udc00": 1}'
    yield "NUL", b'{"a": "\x00"}'
    yield "empty", b""
    yield "blank", b"   \n"


BAD_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "/etc/passwd",
    "//host/share",
    "a//b",
    "a/",
    "./a",
    "..\\x",
    "a\\b",
    "\\\\host\\share",
    "C:x",
    "C:\\x",
    "a:stream",
    "file:///etc/passwd",
    "a\x00b",
    "a\nb",
    "\x1b[31m",
    "nul",
    "CON",
    "com1.txt",
    "a/Aux/b",
    "a.",
    "a ",
    "a*",
    "x" * 300,
    "a/" * 600 + "b",
)

BAD_YAML = {
    "python object": "target: !!python/object/apply:os.system ['touch mark']",
    "python name": "criterion: !!python/name:os.system\ntarget: {sparsity: 0.5}",
    "python module key": "? !!python/module:os\n: 1",
    "local tag": "target: !env SECRET",
    "include tag": "target: !include /etc/passwd",
    "verbatim tag": "target: !<tag:yaml.org,2002:python/object/new:os.system> [x]",
    "harmless tag": "seed: !!int '3'\ntarget: {sparsity: 0.5}",
    "bang": "criterion: ! magnitude\ntarget: {sparsity: 0.5}",
    "tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\ntarget: {sparsity: 0.5}",
    "version directive": "%YAML 1.1\n---\ngranularity: 2:4\ntarget: {sparsity: 0.5}",
    "merge key": "base: &b {sparsity: 0.5}\ntarget:\n  <<: *b",
    "merge list": "target: {<<: [{sparsity: 0.5}]}",
    "doubled key": "target: {sparsity: 0.5}\nseed: 1\nseed: 2",
    "doubled key deep": "target: {sparsity: 0.5, sparsity: 0.9}",
    "two documents": "target: {sparsity: 0.5}\n---\ntarget: {sparsity: 0.9}",
    "deep flow": "protect: " + "[" * 5000,
    "deep flow closed": "protect: " + "[" * 30 + "]" * 30,
    "deep mapping": "".join("  " * i + "a:\n" for i in range(200)),
    "many aliases": "protect: [&a x" + ", *a" * 51 + "]\ntarget: {sparsity: 0.5}",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 6)}]\n" for p, n in zip("abcdefg", "bcdefgh", strict=True)),
    "own parent": "a: &a [*a]\ntarget: {sparsity: 0.5}",
    "own parent mapping": "target: &t {sparsity: 0.5, more: *t}",
    "alias to nothing": "target: *none",
    "key is a list": "? [a, b]\n: 1",
    "key is a number": "1: 2\ntarget: {sparsity: 0.5}",
    "key is null": "~: 2\ntarget: {sparsity: 0.5}",
    "NaN": "target: {threshold: .nan}",
    "infinity": "target: {threshold: .inf}",
    "float too large": "target: {threshold: 1e999}",
    "huge integer": "seed: " + "9" * 5000 + "\ntarget: {sparsity: 0.5}",
    "control characters": "criterion: \x1b[31mred\ntarget: {sparsity: 0.5}",
    "escape in a name": 'criterion: "\\e[31mred"\ntarget: {sparsity: 0.5}',
    "tab": "target:\n\tsparsity: 0.5",
    "open quote": 'criterion: "abc',
    "list": "- a\n- b\n",
    "number": "3\n",
    "blank": "\n\n",
    "too many values": "protect: [" + "a, " * 10_001 + "a]",
    "too large": "# " + "x" * 1_000_001 + "\ntarget: {sparsity: 0.5}",
    "dotted criterion": "criterion: os.system\ntarget: {sparsity: 0.5}",
    "dotted name": "criterion: {name: torch.hub.load, repo: evil}\ntarget: {sparsity: 0.5}",
    "file as name": "criterion: py:/tmp/evil\ntarget: {sparsity: 0.5}",
    "target key": "criterion: {name: magnitude, _target_: os.system}\ntarget: {sparsity: 0.5}",
    "dunder key": "granularity: {name: block, __class__: x}\ntarget: {sparsity: 0.5}",
    "environment": "criterion: ${HOME}\ntarget: {sparsity: 0.5}",
    "dotted class": "protect: ['type:os.PathLike']\ntarget: {sparsity: 0.5}",
    "switch": "trust_remote_code: true\ntarget: {sparsity: 0.5}",
    "dotted optimizer": "recover: [{method: finetune, steps: 1, optimizer: {name: torch.optim.SGD}}]\n"
    "target: {sparsity: 0.5}",
}
