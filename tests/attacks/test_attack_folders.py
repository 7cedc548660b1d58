"""Hostile folders, several hundred: each is refused in words; nothing is run, started, changed, hung or printed."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import signal
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import folders
import hostile
import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FileRefusedError, SecateurError
from secateur.planning import Plan

SECONDS = 5
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
WATCH: list[list[str]] = []


def _audit(event: str, args: tuple[object, ...]) -> None:
    if WATCH and (event in STARTS or event == "pickle.find_class"):
        WATCH[-1].append(f"{event} {args!r:.200}")


sys.addaudithook(_audit)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.unread = 16, 16
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)).view(-1, self.width))


class Hung(BaseException):
    """Not an Exception: no handler of the code under test may take it for one of its own."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything under a folder that a reader might change."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        told = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() and told.st_size < 1 << 20 else b""
        found[str(path.relative_to(folder))] = (told.st_mode, told.st_size, told.st_mtime_ns, content)
    return found


def unseen(text: str) -> list[str]:
    return [char for char in text if unicodedata.category(char) in {"Cc", "Cf"} and char != "\n"]


def refused(action: Callable[[], object], here: Path, capfd: pytest.CaptureFixture[str]) -> SecateurError:
    """Do what must be refused, and check everything that a hostile file may want."""
    before, started = state(here), []
    WATCH.append(started)
    try:
        with at_most(SECONDS), pytest.raises(SecateurError) as caught:
            action()
    finally:
        WATCH.pop()
    assert started == [], "a program was started, or a pickle read"
    assert state(here) == before, "something was changed, deleted or written"
    assert not (here / "CANARY").exists(), "code was run"
    printed = capfd.readouterr()
    assert unseen(str(caught.value) + printed.out + printed.err) == []
    assert caught.value.what
    return caught.value


@pytest.fixture(scope="module")
def result() -> sc.Result:
    torch.manual_seed(0)
    recipe = {"granularity": "channel", "target": {"sparsity": 0.5}, "recover": [], "measure": {"latency": False}}
    return sc.prune(Net().eval(), X, recipe=recipe)


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory) -> Path:
    return result.save(tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def world(tmp_path, saved) -> Path:
    """A good output folder beside a file that must not be touched."""
    shutil.copytree(saved, tmp_path / "out")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    return tmp_path


NAMED = {
    "manifest": list(folders.manifests()),
    "files": list(folders.swapped_files(Path("outside"))),
}
GOOD_PLAN = {
    "schema": 1, "fingerprint": "0" * 64, "model": "Net", "request": {}, "groups": {"fc1": {}},
    "cuts": {"fc1.weight": {}}, "attributes": [], "sizes": [], "masks": {}, "layers": {}, "units": {}, "cost": {},
    "certificate": {}, "decision": "",
}  # fmt: skip
PLANS = [name for name, _ in folders.plans(GOOD_PLAN)]
WEIGHTS = [name for name, _ in folders.weights(hostile.raw({"a": hostile.entry(0, 4)}, bytes(4)), Path("/none"))]


def test_the_good_folder_is_good(world, result):
    with at_most(SECONDS):
        assert torch.equal(sc.load(world / "out", model=Net).eval()(X), result.model.eval()(X))


def test_there_are_more_than_two_hundred():
    count = len(NAMED["manifest"]) + len(NAMED["files"]) + len(PLANS) + len(WEIGHTS)
    count += len(list(folders.in_the_way(Path()))) + len(list(folders.configs())) + len(list(folders.other_configs()))
    assert count + len(list(folders.images())) > 500


@pytest.mark.parametrize(("name", "change"), NAMED["manifest"], ids=[name for name, _ in NAMED["manifest"]])
def test_manifests(world, capfd, name, change):
    change(world / "out")
    refused(lambda: sc.load(world / "out", model=Net), world, capfd)


@pytest.mark.parametrize("name", [name for name, _ in NAMED["files"]])
def test_files_that_are_not_what_was_written(world, capfd, name):
    dict(folders.swapped_files(world / "outside"))[name](world / "out")
    refused(lambda: sc.load(world / "out", model=Net), world, capfd)


@pytest.mark.parametrize("number", range(len(PLANS)), ids=[name.encode("ascii", "replace").decode() for name in PLANS])
def test_plans(world, capfd, number):
    """The attacker writes the right hashes everywhere: only what the plan says can give it away."""
    path = world / "out" / "plan.json"
    data = json.loads(path.read_text())
    name, change = list(folders.plans(data))[number]
    change(data)
    path.write_text(json.dumps(data if name.startswith(("decision", "without decision")) else folders.seal_plan(data)))
    folders.reseal(world / "out")
    refused(lambda: Plan.load(path).apply(Net()), world, capfd)
    refused(lambda: sc.load(world / "out", model=Net), world, capfd)


@pytest.mark.parametrize("number", range(len(WEIGHTS)), ids=WEIGHTS)
def test_weights(world, capfd, number):
    path = world / "out" / "model.safetensors"
    path.write_bytes(list(folders.weights(path.read_bytes(), world / "CANARY"))[number][1])
    folders.reseal(world / "out")
    refused(lambda: sc.load(world / "out", model=Net), world, capfd)


def test_weights_of_a_terabyte_ask_for_no_memory(world, capfd):
    folders.sparse(world / "out")
    error = refused(lambda: sc.load(world / "out", model=Net), world, capfd)
    assert "can belong to this model" in str(error)


@pytest.mark.parametrize("part", ["cuts", "groups"])
def test_indices_are_counted_over_the_whole_plan_before_one_is_spelled_out(world, capfd, part):
    """Each list within its bound, all of them together 2 GB."""
    path = world / "out" / "plan.json"
    data = json.loads(path.read_text())
    for number in range(16):
        if part == "cuts":
            data["cuts"][f"{number}.weight"] = {"0": [[0, 2**24]]}
        else:
            data["groups"][f"{number}"] = {"granularity": "channel", "size": 2**24, "removed": [[0, 2**23]]}
    path.write_text(json.dumps(folders.seal_plan(data)))
    error = refused(lambda: Plan.load(path), world, capfd)
    assert "indices, at most" in error.why


IN_THE_WAY = [name for name, _ in folders.in_the_way(Path("outside"))]


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_force_leaves_what_is_not_ours_whole(world, capfd, result, name):
    dict(folders.in_the_way(world / "outside"))[name](world / "out")
    error = refused(lambda: result.save(world / "out", force=True), world, capfd)
    assert "does not replace" in error.what


def test_force_replaces_what_is_ours(world, result):
    old = (world / "out").stat().st_ino
    result.save(world / "out", force=True)
    assert (world / "out").stat().st_ino != old
    assert [path.name for path in world.iterdir()] == ["out", "outside"] or len(list(world.iterdir())) == 2
    assert torch.equal(sc.load(world / "out", model=Net).eval()(X), result.model.eval()(X))


def test_a_file_that_comes_at_the_last_moment_is_given_back(world, result, monkeypatch):
    """Between the last look and the swap: the folder that was taken is put back with all that is in it."""
    from secateur.files import atomic

    swap = atomic._swap

    def late(temp: Path, target: Path) -> None:
        if not (target / "late.tex").exists() and not (temp / "late.tex").exists():
            (target / "late.tex").write_text("just in time")
        swap(temp, target)

    monkeypatch.setattr(atomic, "_swap", late)
    with pytest.raises(FileRefusedError, match="does not replace"):
        result.save(world / "out", force=True)
    assert (world / "out" / "late.tex").read_text() == "just in time"
    assert sorted(path.name for path in world.iterdir()) == ["out", "outside"]


# -- plans that are well-formed and wrong ------------------------------------------------------------------------


def other_units(data):
    kept = sum(b - a for a, b in data["cuts"]["fc2.weight"]["1"])
    data["cuts"]["fc2.weight"]["1"] = [[16 - kept, 16]]


def other_count(data):
    for name, dims in data["cuts"].items():
        for d in dims:
            data["cuts"][name][d] = [[0, 4]]


def one_span_less(data):
    del data["cuts"]["fc1.bias"]


def another_integer(data):
    data["attributes"] = [{**a, "value": a["value"] - 1} for a in data["attributes"]]


def no_integer(data):
    data["attributes"] = []


def an_integer_that_no_forward_reads(data):
    """Nothing that runs could show it: only the comparison with what the units mean."""
    data["attributes"].append({"owner": "", "name": "unread", "item": None, "value": 3})


def no_units(data):
    data["groups"] = {}


def other_group(data):
    group = data["groups"].pop(next(iter(data["groups"])))
    data["groups"]["fc2"] = {**group, "size": 4, "removed": [[0, 2]]}


WRONG = (
    other_units, other_count, one_span_less, another_integer, no_integer, an_integer_that_no_forward_reads, no_units,
    other_group,
)  # fmt: skip


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_plan_that_was_changed_never_comes_out_as_certified(tmp_path, result, change, sealed):
    data = json.loads(result.plan.to_json())
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(folders.seal_plan(data) if sealed else data))
    if not sealed:  # the record is about another decision, which is seen without any model
        with pytest.raises(FileRefusedError, match="changed after its certificate"):
            Plan.load(path)
        return
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    ways = (
        lambda plan: plan.apply(model, example=X),
        lambda plan: plan.apply(model, example=X, inplace=True),
        lambda plan: plan.prove(model, X),
    )
    for prove in ways:
        with pytest.raises(SecateurError):
            prove(Plan.load(path))
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    plan = Plan.load(path)
    assert plan.certificate is None
    assert "not proved here" in plan.explain()
    plan.save(path)  # a copy of the file, record and all: still no certificate
    assert Plan.load(path).certificate is None
    bare = {**data, "certificate": None, "decision": None}
    assert "no record of a proof" in Plan.from_data(bare).explain()
    with pytest.raises(SecateurError):
        Plan.from_data(bare).certify()


def test_a_good_plan_is_proved_anew_and_says_so(tmp_path, result):
    result.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.certificate is None
    assert plan.recorded == result.plan.certificate
    fresh = Net().eval()
    plan.apply(fresh)
    assert plan.certificate is None, "nothing was at hand to prove it with"
    cut = plan.apply(fresh, example=X)
    assert plan.certificate is not None
    assert "not proved" not in plan.explain()
    assert cut.fc1.out_features == 8


def test_a_plan_of_this_process_is_proved_on_every_model_it_is_applied_to():
    class Other(Net):
        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)).flip(1).view(-1, self.width))

    torch.manual_seed(1)
    plan = sc.plan(Net().eval(), X, granularity="channel", target={"sparsity": 0.5})
    plan.apply(Net().eval())
    with pytest.raises(SecateurError):
        plan.apply(Other().eval())


def test_composed_plans_of_files_are_records_too(tmp_path):
    model = Net().eval()
    first = sc.plan(model, X, granularity="channel", target={"count": 4})
    between = first.apply(model)
    second = sc.plan(between, X, granularity="channel", target={"count": 4})
    second.apply(between)
    for number, plan in enumerate((first, second)):
        plan.save(tmp_path / f"{number}.json")
    read = [Plan.load(tmp_path / f"{number}.json") for number in range(2)]
    assert first.then(second, model).certificate is not None
    for a, b in ((read[0], second), (first, read[1]), read):
        both = a.then(b, model)
        assert both.certificate is None
        assert "in part as a file records it" in both.explain() or both.recorded is None
        assert both.prove(Net().eval(), X) is not None


def test_a_second_round_on_a_folder_that_nobody_proved_says_so(world, result):
    loaded = sc.load(world / "out", model=Net).eval()
    recipe = {"granularity": "channel", "target": {"count": 2}, "recover": [], "measure": {"latency": False}}
    second = sc.prune(loaded, X, recipe=recipe)
    assert any("not proved here" in said for said in second.report.warnings)
    second.save(world / "second")
    plan = Plan.load(world / "second" / "plan.json")
    assert plan.recorded.method == "composed, in part as a file records it"
    proved = sc.load(world / "out", model=Net, example=X).eval()
    assert not any("not proved" in said for said in sc.prune(proved, X, recipe=recipe).report.warnings)


def test_a_wrong_plan_in_a_good_folder_is_seen_with_an_example(world, capfd):
    data = json.loads((world / "out" / "plan.json").read_text())
    other_units(data)
    (world / "out" / "plan.json").write_text(json.dumps(folders.seal_plan(data)))
    folders.reseal(world / "out")
    refused(lambda: sc.load(world / "out", model=Net, example=X), world, capfd)


# -- names that write to the terminal ----------------------------------------------------------------------------


def test_names_with_escapes_are_shown_and_not_obeyed(tmp_path, capfd):
    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(folders.ESCAPE + "\nfake line", nn.Linear(8, 16))
            self.last = nn.Linear(16, 4)

        def forward(self, x):
            return self.last(torch.relu(next(iter(self.children()))(x)))

    model = Evil().eval()
    plan = sc.plan(model, X, granularity="channel", target={"sparsity": 0.5})
    plan.apply(model)
    other = sc.plan(model, X, granularity="channel", target={"sparsity": 0.25})
    assert unseen(plan.explain() + plan.diff(other)) == []
    assert "\\x1b" in plan.explain()
    assert not any(line.startswith("fake line") for line in plan.explain().splitlines())
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert unseen(loaded.explain()) == []
    refused(lambda: loaded.apply(Net()), tmp_path, capfd)


@pytest.mark.parametrize("what", ["hidden\x1b[2Jname", "reversed\u202e", "bell\x07", "line\rover", "c1\x9b31m"])
def test_no_error_carries_a_control_character(what):
    error = SecateurError(f"a {what}", why=what, hint=what)
    assert unseen(str(error) + error.what + error.why + error.hint + str(error.args)) == []


@pytest.mark.parametrize("command", ["measure", "export", "reload-check"])
def test_the_command_line_shows_hostile_names(world, capfd, command):
    from secateur.cli.main import main

    folder = world / f"out{folders.ESCAPE}"
    (world / "out").rename(folder)
    (folder / "plan.json").write_text("{}")
    args = [command, str(folder), "--model", "demo:lenet"]
    code = main([*args, "--out", str(world / "x")] if command == "export" else args)
    printed = capfd.readouterr()
    assert code == 3
    assert unseen(printed.out + printed.err) == []
    assert "refused" in printed.err


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
