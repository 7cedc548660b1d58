"""Hostile folders, several hundred: each is refused in words; nothing is run, started, changed, hung or printed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import folders
import hostile
import pytest
import torch
from torch import nn
from watch import SECONDS, at_most, refused, unseen

import secateur as sc
from secateur.errors import FileRefusedError, SecateurError
from secateur.planning import Plan

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.unread = 16, 16
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)).view(-1, self.width))


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
GOOD_PLAN = {  # of the form that is written: names of tests are made before there is a plan
    "attributes": [], "certificate": {}, "conditions": [], "cost": {}, "cuts": {"fc1.weight": {}}, "decision": "",
    "fingerprint": "0" * 64, "groups": {"fc1": {}}, "layers": {}, "left_out": [], "masks": {}, "model": "Net",
    "request": {}, "scales": [], "schema": 1, "sizes": [], "units": {},
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "change"), NAMED["manifest"], ids=[name for name, _ in NAMED["manifest"]])
def test_manifests(world, capfd, name, change):
    change(world / "out")
    refused(lambda: sc.load(world / "out", model=Net), world, capfd)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [name for name, _ in NAMED["files"]])
def test_files_that_are_not_what_was_written(world, capfd, name):
    dict(folders.swapped_files(world / "outside"))[name](world / "out")
    refused(lambda: sc.load(world / "out", model=Net), world, capfd)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("number", range(len(PLANS)), ids=[name.encode("ascii", "replace").decode() for name in PLANS])
def test_plans(world, capfd, number):
    """The attacker writes the right hashes everywhere: only what the plan says can give it away."""
    path = world / "out" / "plan.json"
    data = json.loads(path.read_text())
    name, change = list(folders.plans(data))[number]
    assert name == PLANS[number]
    change(data)
    path.write_text(json.dumps(data if name.startswith(("decision", "without decision")) else folders.seal_plan(data)))
    folders.reseal(world / "out")
    refused(lambda: Plan.load(path).apply(Net()), world, capfd)
    refused(lambda: sc.load(world / "out", model=Net), world, capfd)


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(2)
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
