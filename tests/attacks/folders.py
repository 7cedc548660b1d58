"""Generators of hostile folders: each changes a good one in one way. A canary leaves a mark when somebody runs it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import hostile

from secateur.files.seeds import canonical_json
from secateur.planning.files import decision_hash

Change = Callable[[Path], object]
ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e"  # sets the title, turns red, reverses the line
FILES = ("plan.json", "model.safetensors", "recipe.yaml", "report.json", "report.html", "environment.json", "log.jsonl")


def write_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads((folder / "manifest.json").read_text())
    changed = change(table)
    (folder / "manifest.json").write_text(json.dumps(table if changed is None else changed))


def reseal(folder: Path) -> None:
    """What an attacker who knows the format does after every change: write the right hashes."""
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"]
    table = {name: sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "manifest.json").write_text(canonical_json(table))


def seal_plan(data: dict[str, Any]) -> dict[str, Any]:
    """The same for the decision that a certificate is about, where it can be written down at all."""
    with suppress(KeyError, TypeError, ValueError):
        data["decision"] = decision_hash(data)
    return data


# -- the manifest ------------------------------------------------------------------------------------------------


def manifests() -> Iterator[tuple[str, Change]]:
    """Manifests that are none."""

    def text(data: bytes) -> Change:
        return lambda folder: (folder / "manifest.json").write_bytes(data)

    def edit(change: Callable[[dict[str, Any]], object]) -> Change:
        return lambda folder: write_manifest(folder, change)

    yield "missing", lambda folder: (folder / "manifest.json").unlink()
    for name, data in (("empty", b""), ("no files", b"{}"), ("a list", b"[]"), ("null", b"null"), ("a text", b'"x"')):
        yield name, text(data)
    yield "two documents", text(b"{} {}")
    yield "deep", text(b'{"plan.json":' * 2000)
    yield "a pickle", text(next(hostile.pickles(Path("/nonexistent/mark")))[1])
    yield "larger than a manifest", text(b'{"x":"' + b"a" * 300_000 + b'"}')
    yield "too many files", edit(lambda table: {f"{i}.txt": "0" * 64 for i in range(300)})
    right = "0" * 64
    for name, value in (
        ("null", None), ("a number", 5), ("true", True), ("empty", ""), ("short", "0" * 63), ("long", "0" * 65),
        ("no hex", "g" * 64), ("upper case", "A" * 64), ("blank", " " * 64), ("a list", [right]), ("an object", {}),
        ("line feed", right[:-1] + "\n"), ("escape", ESCAPE),
    ):  # fmt: skip
        yield f"hash of the plan is {name}", edit(lambda table, value=value: table.update({"plan.json": value}))
        yield f"hash of the report is {name}", edit(lambda table, value=value: table.update({"report.html": value}))
    for name in ("plan.json", "model.safetensors"):
        yield f"no hash of {name}", edit(lambda table, name=name: table.pop(name) and None)
        yield f"another hash of {name}", edit(lambda table, name=name: table.update({name: right}))
        yield f"{name} twice", lambda folder, name=name: _twice(folder, name)
    yield "lists itself", edit(lambda table: table.update({"manifest.json": right}))
    yield "lists what is not there", edit(lambda table: table.update({"absent.bin": right}))
    yield "names in two cases", edit(lambda table: table.update({"PLAN.json": table["plan.json"]}))
    for name in hostile.BAD_NAMES:
        yield f"lists {name[:20]!a}", edit(lambda table, name=name: table.update({name: right}))


def _twice(folder: Path, name: str) -> None:
    text = (folder / "manifest.json").read_text().rstrip("\n}")
    (folder / "manifest.json").write_text(f'{text},"{name}":"{"0" * 64}"}}')


# -- the files beside it -----------------------------------------------------------------------------------------


def swapped_files(outside: Path) -> Iterator[tuple[str, Change]]:
    """Every file of the folder, changed, gone, or something else than a file."""
    for name in FILES:
        yield f"{name}: one bit", lambda folder, name=name: _flip(folder / name)
        yield f"{name}: cut short", lambda folder, name=name: os.truncate(folder / name, 7)
        yield f"{name}: longer", lambda folder, name=name: _append(folder / name)
        yield f"{name}: empty", lambda folder, name=name: os.truncate(folder / name, 0)
        yield f"{name}: missing", lambda folder, name=name: (folder / name).unlink()
        for what in ("a pipe", "a folder", "a link", "a hard link", "a link to itself", "a device", "a pickle"):
            if (name, what) != ("log.jsonl", "a device"):
                yield f"{name}: {what}", lambda folder, n=name, what=what: _becomes(folder / n, what, outside)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 1
    path.write_bytes(data or b"x")


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _becomes(path: Path, what: str, outside: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
        (path / path.name).write_bytes(data)
    elif what == "a pickle":
        path.write_bytes(pickle.dumps(hostile.Bomb(outside / "CANARY")))
    elif what == "a device":
        path.symlink_to("/dev/zero")
    elif what == "a link to itself":
        path.symlink_to(path.name)
    else:
        # The same bytes, so that nothing but the way to them is wrong.
        copy = outside / f"copy-of-{path.name}"
        copy.write_bytes(data)
        path.symlink_to(copy) if what == "a link" else os.link(copy, path)


# -- plans -------------------------------------------------------------------------------------------------------


def plans(good: dict[str, Any]) -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    """Plans that break one rule each; what they are called says which. Each gets a copy of a good one."""
    for key in good:
        yield f"without {key}", lambda d, key=key: d.pop(key)
        for value in (5, "x", [1], {"x": 1}, True):
            if type(value) is not type(good[key]) and not (key == "schema" and value == 1):
                yield f"{key} is {value!r}", lambda d, key=key, value=value: d.update({key: value})
    yield "unknown key", lambda d: d.update(code="import os")
    yield "no schema of ours", lambda d: d.update(schema=2)
    yield "schema is true", lambda d: d.update(schema=True)
    yield "schema is 1.0", lambda d: d.update(schema=1.0)
    for text in ("", "0" * 63, "Z" * 64, "0" * 64 + "\n", ESCAPE):
        yield f"fingerprint {text[:9]!a}", lambda d, text=text: d.update(fingerprint=text)
    name, group = next(iter(good["cuts"])), next(iter(good["groups"]))
    for runs in (
        [[0, 2**31]], [[0, 2**40]], [[0, 2**63]], [[0, 10**400]], [[i, i + 2**20] for i in range(0, 2**26, 2**20)],
        [[-1, 2]], [[3, 1]], [[2, 2]], [[0, 5], [4, 6]], [[4, 5], [0, 1]], [[0.0, 2.0]], [[True, 3]], [["0", "2"]],
        [[None, 2]], [[0]], [[0, 1, 2]], [0, 1], "0-3", None, {}, [], [[]], [[[0, 1]]],
    ):  # fmt: skip
        said = json.dumps(runs)[:24]
        yield f"cut runs {said}", lambda d, runs=runs: d["cuts"][name].update({"0": runs})
        if runs != []:  # a group may lose nothing
            yield f"removed {said}", lambda d, runs=runs: d["groups"][group].update(removed=runs)
    for dim in ("-1", "zero", "99", "00", "1.0", "", "0" * 5000, ESCAPE, "9" * 30):
        yield f"dimension {dim[:9]!a}", lambda d, dim=dim: d["cuts"][name].update({dim: [[0, 1]]})
    for strange in ("nowhere.weight", "", ESCAPE, "x" * 10_000, "fc1", "__class__"):
        yield f"cut of {strange[:9]!a}", lambda d, s=strange: d["cuts"].update({s: {"0": [[0, 1]]}})
    for size in (0, -1, 2**70, 1.0, "32", None):
        yield f"group of {size!r}", lambda d, size=size: d["groups"][group].update(size=size)
    yield "group name of 10,000 letters", lambda d: d["groups"].update({"x" * 10_000: d["groups"][group]})
    yield "group with a key more", lambda d: d["groups"][group].update(run="os.system")
    attribute = {"owner": "", "name": "width", "item": None, "value": 4}
    for change in (
        {"value": "os.system"}, {"value": -1}, {"value": 2**70}, {"value": None}, {"value": True}, {"value": 1.5},
        {"name": 3}, {"name": "__class__"}, {"name": "training"}, {"name": "forward"}, {"name": ESCAPE},
        {"owner": "nowhere"}, {"owner": "__dict__"}, {"owner": "." * 4000}, {"owner": "fc1._parameters"},
        {"item": -1}, {"item": "0"}, {"item": 2**40}, {"code": "x"},
    ):  # fmt: skip
        for key in ("attributes", "sizes") if "value" not in change else ("attributes",):
            yield f"{key} {change}", lambda d, key=key, c=change: d.update({key: [{**attribute, **c}]})
    yield "an attribute twice", lambda d: d.update(attributes=[attribute, attribute])
    yield "another size before", lambda d: d.update(sizes=[{**attribute, "owner": "fc1", "name": "out_features"}])
    for change in (
        {"shape": [8, 16], "kept": 0, "bits": ""}, {"shape": [2**40, 2**40], "kept": 0, "bits": ""},
        {"shape": [-1, -1], "kept": 0, "bits": "AA=="}, {"shape": [8], "kept": 9, "bits": "/w=="},
        {"shape": [8], "kept": 8, "bits": "/w"}, {"shape": [8], "kept": 8, "bits": "\n/w=="},
        {"shape": [8], "kept": 8, "bits": "*w=="}, {"shape": [8], "kept": 8.0, "bits": "/w=="},
        {"shape": "8", "kept": 8, "bits": "/w=="}, {"shape": [8], "kept": 8, "bits": 255},
        {"shape": [1] * 100, "kept": 1, "bits": "gA=="}, {"shape": [8], "kept": 8, "bits": "/w==", "code": "x"}, {},
        {"shape": [4], "kept": 4, "bits": "8A=="},
    ):  # fmt: skip
        yield f"mask {str(change)[:40]}", lambda d, c=change: d.update(masks={name: c})
    yield "mask of nothing", lambda d: d.update(masks={"nowhere": {"shape": [8], "kept": 8, "bits": "/w=="}})
    for entry in (
        {"size": 3, "removed": [0], "lists": []}, {"size": 2**40, "removed": [0], "lists": []},
        {"size": 2, "removed": [0, 1], "lists": []}, {"size": 2, "removed": [5], "lists": []},
        {"size": 2, "removed": [-1], "lists": []}, {"size": 2, "removed": [], "lists": []},
        {"size": 2, "removed": ["0"], "lists": []}, {"size": 2, "removed": [0], "lists": [["fc1"]]},
        {"size": 2, "removed": [0], "lists": 3}, {"size": 2, "removed": [0]}, {},
    ):  # fmt: skip
        yield f"layers {entry}", lambda d, e=entry: d.update(layers={"": e})
    for change in (
        {"removed": -1},
        {"removed": 10**6},
        {"total": "x"},
        {"sparsity": 2.0},
        {"what": 1},
        {"total": 2**70},
    ):
        yield f"units {change}", lambda d, c=change: d["units"].update(c)
    for cost in ({"macs": ["x", None]}, {"macs": [1]}, {"macs": [1, 2, 3]}, {"macs": [-1, 2]}, {ESCAPE: [1, 2]}):
        yield f"cost {cost!a}", lambda d, c=cost: d.update(cost=c)
    for change in (
        {"max_abs_error": "no"}, {"max_abs_error": -1.0}, {"tolerance": None}, {"method": 3}, {"method": "x" * 200_000},
        {"dtype": ["float32"]}, {"outputs": -1}, {"code": "x"}, {"max_abs_error": True},
    ):  # fmt: skip
        yield f"certificate {str(change)[:40]}", lambda d, c=change: d["certificate"].update(c)
    for change in (
        {"criterion": "os.system", "seed": -1}, {"scope": "world"}, {"target": {"macs": 50}}, {"min_keep": -1},
        {"granularity": []}, {"protect": "fc1"}, {"protect": [1]}, {"steps": {"a": 1}}, {"steps": [{"target": {}}]},
        {"import": "os"}, {"round_to": 0}, {"protect": ["x" * 2_000_000]}, {"target": {"sparsity": "a lot"}},
    ):  # fmt: skip
        yield f"request {str(change)[:40]}", lambda d, c=change: d["request"].update(c)


# -- weights -----------------------------------------------------------------------------------------------------


def weights(good: bytes, canary: Path) -> Iterator[tuple[str, bytes]]:
    """Weight files that are none, or belong elsewhere; the manifest is right about all of them."""
    yield from hostile.pickles(canary)
    yield from hostile.containers(canary)
    yield from hostile.lies()
    length = int.from_bytes(good[:8], "little")
    header, payload = json.loads(good[8 : 8 + length]), good[8 + length :]
    name = next(key for key in header if key != "__metadata__")

    def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
        copy = json.loads(json.dumps(header))
        change(copy)
        return hostile.raw(copy, payload)

    yield "another dtype of the same width", edited(lambda h: h[name].update(dtype="I32"))
    yield "another shape of the same size", edited(lambda h: h[name].update(shape=[*reversed(h[name]["shape"]), 1]))
    yield "a name with escapes", edited(lambda h: h.update({ESCAPE: h.pop(name)}))
    yield "a tensor of another name", edited(lambda h: h.update(other=h.pop(name)))
    yield (
        "a tensor more",
        hostile.raw({**header, "more": hostile.entry(len(payload), len(payload) + 4)}, payload + b"1234"),
    )


def sparse(folder: Path) -> None:
    """A file that claims, and seems to have, a terabyte."""
    text = json.dumps({"a": hostile.entry(0, 2**40, [2**38])}).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + 2**40)
    write_manifest(folder, lambda table: table.update({"model.safetensors": "0" * 64}))


# -- what is in the way of --force -------------------------------------------------------------------------------


def in_the_way(outside: Path) -> Iterator[tuple[str, Change]]:
    """Folders that --force must leave whole. Each begins as an output folder of ours."""
    for name in ("thesis.tex", ".DS_Store", "notes", "Manifest.json", "report.json.bak", "model.onnx"):
        yield f"holds {name}", lambda folder, name=name: (folder / name).write_text("three years of work")
    yield "holds a folder", lambda folder: _deep(folder / "data", "three years of work")
    yield "holds an empty folder", lambda folder: (folder / "data").mkdir()
    yield "holds a git repository", lambda folder: _deep(folder / ".git", "ref: refs/heads/main")
    yield "holds a link", lambda folder: (folder / "link").symlink_to(outside)
    yield "holds a pipe", lambda folder: os.mkfifo(folder / "pipe")
    for name in FILES:
        yield f"{name} was changed", lambda folder, name=name: _append(folder / name)
        yield f"{name} is gone", lambda folder, name=name: (folder / name).unlink()
        yield f"{name} is a link", lambda folder, name=name: _becomes(folder / name, "a link", outside)
    yield "only a report of somebody", lambda folder: _only(folder, {"report.json": "{}", "thesis.tex": "x"})
    yield "only a plan of somebody", lambda folder: _only(folder, {"plan.json": "{}"})
    yield "a manifest of somebody", lambda folder: _only(folder, {"manifest.json": '{"files": []}', "plan.json": "{}"})
    yield "a manifest alone", lambda folder: _only(folder, {"manifest.json": '{"plan.json": "' + "0" * 64 + '"}'})
    yield "other files, well listed", lambda folder: (_only(folder, {"thesis.tex": "x"}), reseal(folder))
    for name, change in manifests():
        if not name.startswith(("hash of the report", "lists '")):
            yield f"manifest: {name}", change


def _deep(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "HEAD").write_text(text)


def _only(folder: Path, files: dict[str, str]) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


# -- Hugging Face ------------------------------------------------------------------------------------------------


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is added to a good config.json: wishes to run code, and counts that only cost time."""
    evil = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    yield "auto_map", {"auto_map": evil}
    yield "auto_map to another repository", {"auto_map": {"AutoModel": "somebody/else--evil.Model"}}
    yield "auto_map as a list", {"auto_map": ["evil.Model"]}
    yield "auto_map inside", {"text_config": {"auto_map": evil}}
    yield "auto_map in a list", {"parts": [{"auto_map": evil}]}
    yield "auto_map for an unknown type", {"model_type": "evil", "auto_map": evil}
    yield "an unknown type", {"model_type": "evil"}
    yield "no type", {"model_type": None}
    yield "custom pipelines", {"custom_pipelines": {"evil": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}}}
    yield "custom generate", {"custom_generate": "evil"}
    yield "a switch", {"trust_remote_code": True}
    yield "a target", {"_target_": "os.system", "_partial_": True}
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "attn_kernel"):
        yield key, {key: "somebody/evil-kernel"}
    yield "a kernel per part", {"attn_implementation": {"text_config": "somebody/evil:layer"}}
    yield "experts by a kernel", {"experts_implementation": "somebody/evil"}
    yield "kernels by a mapping", {"kernel_config": {"RMSNorm": "somebody/evil:RMSNorm"}}
    for name in (
        "os.system",
        "../evil",
        "evil",
        "AutoModelForMaskGeneration",
        "pipeline",
        "Trainer",
        "logging",
        "BertConfig",
        ESCAPE,
    ):
        yield f"architecture {name[:20]!a}", {"architectures": [name]}
    yield "architecture is a mapping", {"architectures": [{"auto_map": evil}]}
    yield "a tokenizer class", {"tokenizer_class": "evil.Tokenizer"}
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        yield f"{key} of a billion", {key: 10**9}
    yield "a text for a size", {"hidden_size": "os.system('x')"}
    yield "a negative size", {"hidden_size": -16}
    yield "a size of nothing", {"num_attention_heads": 0}
    yield "escapes", {"model_type": ESCAPE, ESCAPE: ESCAPE}


def other_configs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, file, content) of the other files that transformers reads."""
    evil = {"AutoTokenizer": ["evil.Tokenizer", None]}
    yield "tokenizer asks for code", "tokenizer_config.json", {"auto_map": evil, "tokenizer_class": "BertTokenizer"}
    yield "tokenizer by a path", "tokenizer_config.json", {"tokenizer_class": "os.path"}
    yield "processor asks for code", "preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.P"}}
    yield "generation asks for code", "generation_config.json", {"custom_generate": "evil"}
    yield "adapter asks for code", "adapter_config.json", {"auto_mapping": None, "auto_map": {"x": "evil.A"}}
    for name in ("../outside/x.safetensors", "/etc/passwd", "evil.bin\x00", ESCAPE):
        index = {"metadata": {}, "weight_map": {"a": name}}
        yield f"index leads to {name[:12]!a}", "model.safetensors.index.json", index
    yield "index is no index", "model.safetensors.index.json", {"weight_map": [1]}


# -- images ------------------------------------------------------------------------------------------------------


def images() -> Iterator[tuple[str, bytes]]:
    """Bytes that are called .png and are something else, or more than they seem."""
    from PIL import Image

    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    yield (
        "EPS behind a DOS header",
        b"\xc5\xd0\xd3\xc6" + bytes(26) + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    )
    yield "PostScript", b"%!PS\n(/tmp/x) (w) file\n"
    yield "PDF", b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n"
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "HTML", b"<html><script>1</script></html>"
    for form in (
        "GIF",
        "TIFF",
        "PPM",
        "ICO",
        "TGA",
        "PCX",
        "SGI",
        "ICNS",
        "DDS",
        "JPEG2000",
        "AVIF",
        "MSP",
        "XBM",
    ):
        buffer = io.BytesIO()
        try:
            Image.new("1" if form in {"MSP", "XBM"} else "RGB", (8, 8)).save(buffer, form)
        except (KeyError, OSError, ValueError):
            continue  # this Pillow cannot write it
        yield form, buffer.getvalue()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    good = buffer.getvalue()
    yield "a PNG cut short", good[: len(good) // 2]
    yield "a PNG without its end", good[:40]
    yield "a PNG of 60,000 by 60,000", _png(60_000, 60_000)
    yield "a PNG of 7,000 by 7,000", _png(7_000, 7_000)
    yield "a PNG of no width", _png(0, 8)
    yield "a pickle", pickle.dumps(hostile.Bomb(Path("/nonexistent/mark")))
    yield "empty", b""
    yield "zeros", bytes(1000)


def _png(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
