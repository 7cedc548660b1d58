"""A run that is interrupted or killed anywhere goes on, and ends with the bytes of a run that was not."""

import copy
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_fork import killed_fork
from torch import nn

import secateur as sc
from secateur.criteria import StationaryWarning
from secateur.errors import FileRefusedError, InputError, RecipeError
from secateur.files import checkpoint, disk
from secateur.files.checkpoint import INDEX
from secateur.model.hashing import hash_model
from secateur.report.journal import Journal
from secateur.sources import TensorData
from secateur.statistics.notes import CurvatureWarning

QUICK = {"measure": {"rounds": 2, "warmup": 0, "latency": False}}


class Net(nn.Module):
    """Batch norm has buffers, dropout draws: both belong to the state."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 12), nn.ReLU()
        )
        self.top = nn.Linear(12, 3)

    def forward(self, x):
        return self.top(self.body(x))


class Noisy:
    """Batches whose order and noise come from the global generators of all three libraries, anew in each pass."""

    def __len__(self):
        return 4

    def __iter__(self):
        order = torch.randperm(4).tolist()
        for number in order:
            g = torch.Generator().manual_seed(number)
            x, y = torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)
            yield x + torch.randn_like(x) * 0.1 + np.random.rand() * 0.1 + random.random() * 0.1, y  # noqa: NPY002


def net():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net()


def loader():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(32, 6, generator=g), torch.randint(0, 3, (32,), generator=g)
    dataset = torch.utils.data.TensorDataset(x, y)
    generator = torch.Generator().manual_seed(9)
    return torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, generator=generator)


def tensor_data():
    g = torch.Generator().manual_seed(3)
    return TensorData(torch.randn(32, 6, generator=g), torch.arange(32) % 3, batch_size=8, shuffle=True)


TUNE = {"method": "finetune", "epochs": 3, "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}}
LESSONS = {"epochs": 3, "optimizer": {"name": "adamw", "lr": 0.01}, "rates": "cosine"}
CUT = {"target": {"params": 0.6}, "recover": [{"method": "bn_refresh", "batches": 2}, {**TUNE, "schedule": "cosine"}]}
MASKS = {"granularity": "element", "target": {"sparsity": 0.5}}
RUNS = {
    "cut": (Noisy, CUT),
    "control": (Noisy, {**CUT, "control": "dense"}),
    "generator of the loader": (
        loader,
        {**MASKS, "recover": [{**TUNE, "schedule": {"name": "StepLR", "step_size": 3}}]},
    ),
    "best": (tensor_data, {**MASKS, "recover": [{**TUNE, "holdout": 0.25, "best": True, "patience": 2}]}),
    "best of a loader": (loader, {**MASKS, "recover": [{**TUNE, "holdout": 0.25, "best": True}]}),
    "distil and accumulate": (
        Noisy,
        {**MASKS, "recover": [{**TUNE, "accumulate": 3, "distil": {"hidden": ["body.0"]}}, {"method": "bn_refresh"}]},
    ),
    "adapters": (Noisy, {**MASKS, "recover": [{**TUNE, "adapters": {"rank": 2}, "amp": "bf16"}]}),
    "gradual": (
        loader,
        {
            "granularity": "element",
            "criterion": "taylor",
            "target": {"sparsity": 0.7},
            "training": {**LESSONS, "method": "gradual", "every": 2, "regrow": "rigl", "distil": {}},
            "recover": [{**TUNE, "epochs": 1}],
        },
    ),
    "gradual cuts": (Noisy, {"target": {"sparsity": 0.5}, "training": {**LESSONS, "method": "gradual", "every": 5}}),
    "movement": (
        Noisy,
        {
            **MASKS,
            "criterion": "movement",
            "training": {**LESSONS, "method": "movement", "every": 2, "form": "soft", "accumulate": 3},
            "control": "dense",
        },
    ),
    "slimming": (
        Noisy,
        {
            "criterion": {"name": "bn-scale", "missing": "keep"},
            "target": {"sparsity": 0.25},
            "training": {**LESSONS, "method": "slimming", "penalty": {"name": "slimming", "strength": 0.1}},
            "recover": [{**TUNE, "epochs": 1}],
        },
    ),
    "gates": (
        Noisy,
        {
            "target": {"sparsity": 0.25},
            "training": {**LESSONS, "method": "slimming", "penalty": {"name": "gates", "strength": 0.1, "lr": 0.1}},
        },
    ),
    "hard concrete": (
        loader,
        {
            "target": {"sparsity": 0.25},
            "training": {**LESSONS, "method": "slimming", "penalty": {"name": "hard_concrete", "strength": 0.1}},
            "recover": [{**TUNE, "epochs": 1}],
        },
    ),
    "growing": (
        Noisy,
        {
            "target": {"sparsity": 0.25},
            "training": {**LESSONS, "method": "slimming", "penalty": {"name": "growing", "strength": 0.1, "every": 2}},
        },
    ),
    "group lasso": (
        Noisy,
        {
            "target": {"sparsity": 0.25},
            "training": {
                **LESSONS,
                "method": "slimming",
                "accumulate": 2,
                "penalty": {"name": "group_lasso", "strength": 0.1, "method": "proximal"},
            },
        },
    ),
    "plateau": (tensor_data, {**MASKS, "recover": [{**TUNE, "holdout": 0.25, "schedule": "ReduceLROnPlateau"}]}),
}


class Stop(Exception):
    pass


def stopping(after):
    """Progress that interrupts the run when it has been called so many times."""
    calls = 0

    def progress(stage, done, total):
        nonlocal calls
        calls += 1
        if after is not None and calls > after:
            raise Stop
        progress.calls = calls

    return progress


def seeded():
    """What quality is measured on draws from the global generators, as the caller left them."""
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002 - the global generator is what is meant
    random.seed(3)


def run(name, folder=None, after=None, every=0):
    data, recipe = RUNS[name]
    progress = stopping(after)
    seeded()
    result = sc.prune(
        net(), torch.zeros(2, 6), data=data(), recipe={**recipe, **QUICK}, progress=progress,
        **({} if folder is None else {"checkpoint": folder, "every": every}),
    )  # fmt: skip
    return result, progress.calls


def facts(result):
    report = result.report
    figures = (report.after.quality, report.before.quality, report.after_cut_quality, report.control)
    return (
        hash_model(result.model),
        result.plan.to_json(),
        figures,
        [(p.step, p.loss, p.lr, p.sparsity) for p in report.training],
    )


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    """Kills and errors are what is tested, and no loss of power: nothing waits for the disk."""
    monkeypatch.setattr(disk, "fsync", lambda fd: None)
    monkeypatch.setattr(disk, "sync_path", lambda path: None)


@pytest.fixture(scope="module", autouse=True)
def _warmed():
    """Modules that are imported within the first run draw from the global generators."""
    run("cut")


QUICKEST = ("best", "distil and accumulate", "gradual")


@pytest.mark.parametrize("name", [n if n in QUICKEST else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_interrupted_anywhere_the_result_is_the_same(name, tmp_path):
    whole, calls = run(name)
    chance = random.Random(name)
    folder = tmp_path / "run"
    stops = 0
    for _ in range(3):
        try:
            run(name, folder, after=chance.randrange(3, calls // 2))
        except Stop:
            stops += 1
    assert stops
    again, _ = run(name, folder)
    assert facts(again) == facts(whole)
    again.save(tmp_path / "out")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("cut", "before"),
        ("gradual", "after"),
        pytest.param("cut", "after", marks=pytest.mark.slow),
        pytest.param("gradual", "before", marks=pytest.mark.slow),
    ],
)
def test_stopped_around_each_exchange_of_the_index_the_result_is_the_same(name, when, tmp_path, monkeypatch):
    """What belongs together goes to the disk in one step: no kill lies between a stage's end and what it told."""
    write, left = checkpoint.atomic_write, 0

    def stopped(path, data):
        nonlocal left
        left -= 1
        if left == 0 and when == "before":
            raise Stop
        write(path, data)
        if left == 0:
            raise Stop

    whole, _ = run(name)
    monkeypatch.setattr(checkpoint, "atomic_write", stopped)
    for number in range(2, 40):  # the first makes the folder
        left = number
        try:
            run(name, tmp_path / str(number), every=1000)
        except Stop:
            left = 0
            again, _ = run(name, tmp_path / str(number))
            assert facts(again) == facts(whole), f"stopped {when} exchange {number}"
        else:
            break
    assert 5 < number < 39


def test_a_warning_is_kept_with_what_was_found_under_it():
    """The stage may be found as done by a process that never hears the warning."""
    journal = Journal()

    def stage():
        with journal.noticed():
            warnings.warn("a direction was given up", CurvatureWarning, stacklevel=1)
            warnings.warn("of nobody here", UserWarning, stacklevel=1)
            warnings.warn("scores stand still", StationaryWarning, stacklevel=1)
            return journal.state_dict()

    with pytest.warns(UserWarning, match="of nobody here"):
        kept = stage()
    assert [one["what"] for one in kept["degradations"]] == ["a direction was given up"]
    assert kept["doubts"] == ["scores stand still"]


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_loader_with_a_generator_of_its_own_goes_on_from_between_any_stages(after, tmp_path):
    """Measuring reads the loader too, and moves its generator; a measure that is kept is not made again."""
    whole, _ = run("gradual")
    with pytest.raises(Stop):
        run("gradual", tmp_path / "run", after=after)
    again, _ = run("gradual", tmp_path / "run")
    assert facts(again) == facts(whole)


def test_a_finished_stage_is_not_done_twice(tmp_path):
    """Neither the scoring, nor a step of the training, nor what was measured."""
    scored, trained = [], []

    class Counting(sc.criteria.get("magnitude").__class__):
        def score(self, context):
            scored.append(1)
            return super().score(context)

    def loss(model, batch):
        trained.append(1)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def go(after):
        data, recipe = Noisy(), {**CUT, **QUICK}
        return sc.prune(
            net(), torch.zeros(2, 6), data=data, recipe=recipe, loss=loss, checkpoint=tmp_path / "c", every=0,
            progress=stopping(after), criterion=Counting(),
        )  # fmt: skip

    with pytest.raises(Stop):
        go(14)
    before = len(trained)
    go(None)
    assert len(scored) == 1
    assert before > 0
    judged = 8  # quality by the loss, on the four batches of the data, before and at the end; the cut was judged before
    assert len(trained) <= 12 + 3 * 4 + judged


def test_sc_resume_goes_on_with_the_recipe_that_was_kept(tmp_path):
    whole, calls = run("cut")
    with pytest.raises(Stop):
        run("cut", tmp_path / "c", after=calls - 4)
    torch.manual_seed(77)
    result = sc.resume(tmp_path / "c", net(), torch.zeros(2, 6), data=Noisy())
    assert facts(result) == facts(whole)


def test_a_loop_of_ones_own_is_done_once_and_needed_again(tmp_path):
    seen = []

    def train(model):
        seen.append(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in Noisy():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def go(after=None, folder=None):
        seeded()
        kept = {} if folder is None else {"checkpoint": folder}
        return sc.prune(
            net(),
            torch.zeros(2, 6),
            data=Noisy(),
            recipe={**MASKS, **QUICK},
            train=train,
            progress=stopping(after),
            **kept,
        )

    whole, calls = go(), len(seen)
    assert calls == 1
    for name, mask in whole.plan.masks.items():
        value = whole.model.get_parameter(name)[~mask]
        assert not value.any()
        assert not torch.signbit(value).any()
        assert not torch.equal(whole.model.get_parameter(name)[mask], net().get_parameter(name)[mask])
    with pytest.raises(Stop):
        go(4, tmp_path / "c")
    with pytest.raises(RecipeError, match="loop of its own"):
        sc.resume(tmp_path / "c", net(), torch.zeros(2, 6), data=Noisy())
    again = sc.resume(tmp_path / "c", net(), torch.zeros(2, 6), data=Noisy(), train=train)
    assert facts(again) == facts(whole)


def interrupted(folder):
    with pytest.raises(Stop):
        run("cut", folder, after=12)


def test_what_does_not_belong_together_is_refused(tmp_path):
    interrupted(tmp_path / "c")
    other = net()
    with torch.no_grad():
        other.top.bias[0] += 1
    with pytest.raises(FileRefusedError, match=r"another run[\s\S]*model differ"):
        sc.resume(tmp_path / "c", other, torch.zeros(2, 6), data=Noisy())
    with pytest.raises(RecipeError, match="does not say how to build"):
        sc.resume(tmp_path / "c")
    with pytest.raises(FileRefusedError, match="nothing to resume"):
        sc.resume(tmp_path / "nowhere", net())
    sc.prune(net(), torch.zeros(2, 6), recipe={"target": {"params": 0.6}}).save(tmp_path / "done")
    with pytest.raises(FileRefusedError, match="the run has ended"):
        sc.resume(tmp_path / "done", net())
    with pytest.raises(RecipeError, match="every="):
        sc.prune(net(), torch.zeros(2, 6), recipe={"target": {"params": 0.6}}, every=3.0)


def test_other_batches_than_before_are_refused(tmp_path):
    class Unsteady(Noisy):
        turn = 0

        def __iter__(self):
            Unsteady.turn += 1
            for x, y in super().__iter__():
                yield x + Unsteady.turn, y

    def go(after):
        recipe = {**MASKS, "recover": [TUNE], **QUICK}
        return sc.prune(
            net(), torch.zeros(2, 6), data=Unsteady(), recipe=recipe, checkpoint=tmp_path / "c", every=0,
            progress=stopping(after),
        )  # fmt: skip

    with pytest.raises(Stop):
        go(10)
    with pytest.raises(InputError, match="batches that they gave"):
        go(None)


@pytest.mark.parametrize("what", ["flipped bit", "cut off", "missing", "index", "code"])
def test_damaged_states_are_refused(what, tmp_path):
    interrupted(tmp_path / "c")
    files = sorted((tmp_path / "c").glob("state-*"))
    for file in files:
        data = bytearray(file.read_bytes())
        if what == "flipped bit":
            data[-1] ^= 1
            file.write_bytes(data)
        elif what == "cut off":
            file.write_bytes(data[:-3])
        elif what == "missing":
            file.unlink()
        elif what == "code":
            torch.save({"a": 1}, file)
    if what == "index":
        index = tmp_path / "c" / INDEX
        index.write_text(index.read_text().replace('"every"', '"x"').replace('"number":', '"number":1'))
    with pytest.raises(FileRefusedError):
        run("cut", tmp_path / "c")


def test_two_processes_do_not_share_a_run(tmp_path):
    interrupted(tmp_path / "c")
    from secateur.files.checkpoint import Checkpoint

    first = Checkpoint(tmp_path / "c")
    with pytest.raises(FileRefusedError, match="in use"):
        run("cut", tmp_path / "c")
    first.close()


def test_killed_with_signal_9_it_goes_on(tmp_path):
    """Forked, since a fresh process would take seconds to begin; the slow tests start fresh ones."""
    whole, _ = run("cut")
    chance = random.Random(4)
    folder = tmp_path / "c"
    kills = 0
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that a fork does not take along: there are none that matter
            pid = os.fork()
        if pid == 0:
            try:
                run("cut", folder)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.05, 0.4))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert kills
    again, _ = run("cut", folder)
    assert facts(again) == facts(whole)
    assert copy.deepcopy(again.model)(torch.zeros(2, 6)).shape == (2, 3)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
import test_resume
torch.set_num_threads(1)
test_resume.disk.fsync = test_resume.disk.sync_path = lambda place: None
print(test_resume.told(test_resume.run({name!r}, sys.argv[1])[0]))
"""


def told(result):
    """The weights and the plan, as one line that a fresh process can write."""
    return hashlib.sha256("".join(facts(result)[:2]).encode()).hexdigest()


TEN_TIMES = ("cut", "best", "gradual", "gradual cuts", "movement", "slimming", "hard concrete", "growing")


@pytest.mark.slow
@pytest.mark.parametrize("name", TEN_TIMES)
def test_ten_kills(name, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads do not come along into a fork
    whole, calls = run(name)
    chance, kills, folder = random.Random(name), 0, tmp_path / "c"
    for _ in range(10):
        after, delay = chance.randrange(2, max(calls // 4, 4)), chance.uniform(0, 0.02)

        def work(progress):
            monkeypatch.setattr(sys.modules[__name__], "stopping", lambda _: progress)
            run(name, folder)

        end = killed_fork(work, after, delay)
        assert end in (0, -signal.SIGKILL)
        kills += end == -signal.SIGKILL
    torch.set_num_threads(threads)
    # The last one is a fresh process, which knows nothing but the files.
    code = SCRIPT.format(tests=str(Path(__file__).parent), name=name)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", code, str(folder)]
    last = subprocess.run(argv, capture_output=True, env=env, text=True, timeout=300, check=False)
    assert last.stdout.split() == [told(whole)], last.stderr
    print(f"{name}: {kills} of 10 processes were killed")
    assert kills >= 5
