"""Lottery tickets: what is rewound, what is masked, what the controls change, and that nothing is done twice."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest
import torch
from killed_fork import killed_fork
from torch import nn
from torch.nn import functional

import secateur as sc
from secateur.errors import FileRefusedError, InputError, RecipeError, SecateurError
from secateur.files import disk
from secateur.files.checkpoint import Checkpoint
from secateur.report.safe_text import significant
from secateur.sources import TensorData
from secateur.tickets.masks import drawn_masks, levels, shuffled

TRAINING = {"epochs": 3, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "schedule": "cosine"}


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=g)
    y = (x[:, 0] > 0).long()
    return {"train": TensorData(x, y, batch_size=8, shuffle=True), "test": [(x, y)]}


def build(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 2))


def plain(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))


class Watch:
    """A loss that keeps the weights at its first call in each training: what was started from."""

    def __init__(self):
        self.starts, self.calls, self.stop = [], 0, None
        self._last = None

    def __call__(self, model, batch):
        self.calls += model.training
        if self.stop is not None and self.calls > self.stop:
            raise KeyboardInterrupt
        if model.training and self._last != id(model):
            self._last = id(model)
            self.starts.append((model, {name: value.detach().clone() for name, value in model.state_dict().items()}))
        return functional.cross_entropy(model(batch[0]), batch[1])


def search(folder, **options):
    common = {"sparsity": 0.5, "rate": 0.3, "seeds": (0,), "controls": (), "training": TRAINING}
    return sc.lottery(build, data(), folder=folder, **{**common, **options})


def kept(found, variant="ticket", seed=0, number=1):
    row = found.row(variant, seed=seed, round=number)
    checkpoint = Checkpoint(found.folder / "cells" / row["key"])
    state = checkpoint.get("end")
    checkpoint.close()
    return state


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    """Kills and errors are what is tested, and no loss of power: nothing waits for the disk."""
    monkeypatch.setattr(disk, "fsync", lambda fd: None)
    monkeypatch.setattr(disk, "sync_path", lambda path: None)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_masks_nest_and_are_exact_and_zeros_stay(scope, tmp_path):
    found = search(tmp_path, scope=scope)
    assert [row["sparsity"] for row in found.rows] == pytest.approx([0.0, 0.3, 0.5], abs=1 / 80)
    first, second = kept(found, number=1), kept(found, number=2)
    for name, mask in second["masks"].items():
        assert not (mask & ~first["masks"][name]).any(), "what was masked stays masked"
        value = second["model"][name][~mask]
        assert not value.any()
        assert not torch.signbit(value).any()
    total = sum(mask.numel() for mask in second["masks"].values())
    assert sum(int((~mask).sum()) for mask in second["masks"].values()) == round(0.5 * total)


@pytest.mark.parametrize("rewind", ["init", {"step": 4}, {"epoch": 1}, {"epoch": 2}, "rates"])
def test_a_ticket_starts_where_it_was_rewound_to(rewind, tmp_path):
    """The dense training is made again here, up to that step; batch norm and dropout are parts of the state."""
    from secateur.recover import finetune

    watch = Watch()
    found = search(tmp_path, rewind=rewind, loss=watch, controls=("reinit",))
    starts = [state for _, state in watch.starts]
    steps = {"init": 0, "rates": 18}.get(rewind if isinstance(rewind, str) else "")
    if steps is None:
        steps = rewind["step"] if "step" in rewind else rewind["epoch"] * 6

    class Until:
        def found(self):
            return None

        def keep(self, step, state):
            if step == steps:
                self.state = {name: value.clone() for name, value in state()["model"].items()}

    again, until = build(0), Until()
    finetune(again, data()["train"], watch, keeper=until, seed=0, **TRAINING)
    masks = kept(found)["masks"]
    for name, value in starts[1].items():
        wanted = until.state[name] * masks[name] if name in masks else until.state[name]
        assert torch.equal(value, wanted), name
    other = build(1_000_003)
    reinit = starts[2]
    for name, mask in masks.items():
        assert torch.equal(reinit[name], other.state_dict()[name] * mask)


def own(model, span):
    """Plain SGD with momentum, one step per batch, in the order of the data."""
    batches = list(data()["test"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if span.state is not None:
        optimizer.load_state_dict(span.state)
    for _ in range(span.start, span.stop):
        x, y = batches[0]
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("rewind", ["init", {"step": 5}, "rates"])
def test_the_built_in_loop_and_one_of_ones_own_find_the_same_ticket(rewind, tmp_path):
    common = {"sparsity": 0.5, "rate": 0.3, "seeds": (3,), "rewind": rewind, "controls": ("shuffled", "reinit")}
    test = data()["test"]
    training = {"steps": 12, "optimizer": TRAINING["optimizer"]}
    ours = sc.lottery(plain, {"train": test, "test": test}, folder=tmp_path / "a", training=training, **common)
    theirs = sc.lottery(plain, {"train": test, "test": test}, folder=tmp_path / "b", train=own, steps=12, **common)
    for variant in ("ticket", "shuffled", "reinit"):
        a, b = (kept(found, variant, seed=3, number=2) for found in (ours, theirs))
        for name, value in a["model"].items():
            assert torch.equal(value, b["model"][name]), (variant, name)
        assert all(torch.equal(mask, b["masks"][name]) for name, mask in a["masks"].items())


def test_controls_change_one_thing_each(tmp_path):
    masks = {"a": torch.rand(20, 30) > 0.7, "b": torch.rand(50) > 0.2}
    by_layer, anywhere = shuffled(masks, 1), drawn_masks(masks, 1)
    assert all(int(by_layer[name].sum()) == int(mask.sum()) for name, mask in masks.items())
    assert any(not torch.equal(by_layer[name], mask) for name, mask in masks.items())
    assert sum(int(m.sum()) for m in anywhere.values()) == sum(int(m.sum()) for m in masks.values())
    assert int(anywhere["b"].sum()) != int(masks["b"].sum())
    watch = Watch()
    found = search(tmp_path, controls=("reinit", "random", "shuffled"), control_rounds=[2], loss=watch)
    assert [row["variant"] for row in found.rows] == ["dense", "ticket", "ticket", "reinit", "random", "shuffled"]
    assert len({row["kept"] for row in found.rows[2:]}) == 1
    ticket, reinit = kept(found, number=2)["masks"], kept(found, "reinit", number=2)["masks"]
    assert all(torch.equal(mask, reinit[name]) for name, mask in ticket.items())


def test_what_is_done_is_not_done_again_and_more_can_be_asked_for(tmp_path):
    watch = Watch()
    first = search(tmp_path, loss=watch)
    calls = watch.calls
    again = search(tmp_path, loss=watch)
    assert watch.calls == calls
    assert again.csv() == first.csv()
    more = search(tmp_path, loss=watch, seeds=(0, 1), controls=("reinit",), control_rounds=[1])
    assert watch.calls == calls + 18 + 2 * 18 + 2 * 18  # the dense network and tickets of seed 1, and two controls
    assert [row for row in more.rows if row in first.rows] == list(first.rows)
    other = search(tmp_path, loss=watch, name="another loss")
    assert not {row["key"] for row in other.rows} & {row["key"] for row in first.rows}


@pytest.mark.slow
@pytest.mark.parametrize("rewind", ["init", {"step": 4}])
def test_interrupted_anywhere_the_tickets_are_the_same(rewind, tmp_path):
    options = {"rewind": rewind, "controls": ("reinit",), "seeds": (0, 1), "every": 0.0}
    whole = search(tmp_path / "whole", **options)
    watch, stops = Watch(), 0
    for stop in (2, 21, 29, 30, 71, 90, None):
        watch = Watch()
        watch.stop = stop
        try:
            found = search(tmp_path / "c", loss=watch, name="", **options)
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 4
    same = [{**row, "seconds": 0} for row in whole.rows]
    assert [{**row, "seconds": 0} for row in found.rows] == same
    for variant, number in (("dense", 0), ("ticket", 2), ("reinit", 1)):
        a, b = kept(whole, variant, 1, number), kept(found, variant, 1, number)
        assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())


SCRIPT = """
import sys
sys.path[:0] = {tests!r}
import torch
import test_lottery
torch.set_num_threads(1)
test_lottery.disk.fsync = test_lottery.disk.sync_path = lambda place: None
test_lottery.told(test_lottery.search(sys.argv[1], **{options!r}), sys.argv[2])
"""


def told(found, path):
    """Rows and the bytes of every network, without the seconds that it took."""
    lines = []
    for row in found.rows:
        state = kept(found, row["variant"], row["seed"], row["round"])
        parts = [value.numpy().tobytes() for value in (*state["model"].values(), *state["masks"].values())]
        lines.append({**row, "seconds": 0, "bytes": hashlib.sha256(b"".join(parts)).hexdigest()})
    Path(path).write_text(json.dumps(lines))


KILLS = 8


@pytest.mark.slow
@pytest.mark.parametrize("rewind", ["init", {"step": 4}, "rates"], ids=["init", "step", "rates"])
def test_a_search_that_is_killed_again_and_again_finds_the_same(rewind, tmp_path):
    options = {"rewind": rewind, "controls": ("reinit", "random"), "every": 0.0}
    threads, calls = torch.get_num_threads(), []
    torch.set_num_threads(1)  # threads do not come along into a fork
    whole = search(tmp_path / "whole", progress=lambda *call: calls.append(call), **options)
    told(whole, tmp_path / "whole.json")
    # Each process makes a part of the calls, so that all the kills together come before the end.
    chance, ends, folder = random.Random(str(rewind)), [], tmp_path / "c"
    for _ in range(KILLS):
        after = chance.randrange(1, len(calls) // (2 * KILLS))
        work = partial(search, folder, **options)
        ends.append(killed_fork(lambda progress, work=work: work(progress=progress), after, chance.uniform(0, 0.01)))
    torch.set_num_threads(threads)
    assert ends == [-signal.SIGKILL] * KILLS
    assert len(list(folder.glob("cells/*"))) > 1, "the kills lie within more than one network"
    # The last one is a fresh process, which knows nothing but the files.
    code = SCRIPT.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], options=options)
    argv = [sys.executable, "-c", code, str(folder), str(tmp_path / "c.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    last = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert last.returncode == 0, last.stderr
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())


def test_a_training_that_was_interrupted_goes_on_in_its_middle(tmp_path):
    watch = Watch()
    watch.stop = 24  # in the middle of the ticket
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, loss=watch, sparsity=0.3, every=0.0)
    watch.stop = None
    found = search(tmp_path, loss=watch, sparsity=0.3, every=0.0)
    assert watch.calls == 18 + 18 + 1  # the step that was interrupted is made again, and no other
    whole = search(tmp_path / "whole", sparsity=0.3)
    assert all(torch.equal(value, kept(found)["model"][name]) for name, value in kept(whole)["model"].items())


def test_the_page_draws_the_training_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["secateur.tickets.lottery"], "_PATIENCE", 0.0)
    seen, notes = [], []

    class Noting:
        takes_note = True

        def __call__(self, what, done, total, note=""):
            notes.append((what, note))
            if (tmp_path / "progress.html").exists() and len(seen) < 1:
                seen.append((tmp_path / "progress.html").read_text())

    found = search(tmp_path, progress=Noting())
    assert 'http-equiv="refresh"' in seen[0]
    last = (tmp_path / "progress.html").read_text()
    assert 'http-equiv="refresh"' not in last
    drawn: dict[str, dict[int, str]] = {}
    for step, name, value in re.findall(r'step (\d+): (loss|sparsity|learning rate|quality) ([\w.+-]+)"', last):
        drawn.setdefault(name, {})[int(step)] = value
    assert set(drawn) == {"loss", "sparsity", "learning rate"}
    assert len(drawn["loss"]) == 18
    assert set(drawn["sparsity"].values()) == {significant(found.rows[-1]["sparsity"], 4)}
    assert "seed 0, ticket 2" in last
    assert ("seed 0, ticket 2", notes[-1][1]) == notes[-1]
    assert notes[-1][1].startswith("loss ")


def test_table_and_plot_say_what_the_rows_say(tmp_path):
    pytest.importorskip("scipy")
    found = search(tmp_path, seeds=(0, 1, 2), controls=("reinit",))
    values = [row["figures"]["accuracy"] for row in found.rows if row["variant"] == "ticket" and row["round"] == 2]
    cell = found.cells()[("ticket", round(found.row(seed=0, round=2)["sparsity"], 6))]
    mean, sd = sum(values) / 3, torch.tensor(values).double().std().item()
    assert (cell.mean, cell.half) == pytest.approx((mean, 4.302653 * sd / 3**0.5), rel=1e-6)
    assert str(cell) in found.table()
    root = ET.fromstring((tmp_path / "plot.svg").read_text())
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ticket", "reinit", "dense", "accuracy"} <= set(texts)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(found.rows)
    assert all(json.loads(path.read_text())["key"] == path.parent.name for path in tmp_path.glob("cells/*/row.json"))


def test_levels_end_where_they_are_asked_to():
    assert levels(0.9, 0.2)[-1] == 0.9
    assert levels(0.9, 0.2)[:3] == pytest.approx([0.2, 0.36, 0.488])
    assert levels(0.1, 0.2) == [0.1]
    assert levels(0.2, 0.2) == [0.2]


REFUSED = {
    "sparsity": ({"sparsity": 1.0}, "between 0 and 1"),
    "rewind": ({"rewind": "epoch"}, "rewind="),
    "rewound beyond the end": ({"rewind": {"step": 99}}, "ends before step 99"),
    "control": ({"controls": ("other",)}, "no control"),
    "seeds": ({"seeds": (1, 1)}, "each once"),
    "scope": ({"scope": "row"}, "global"),
    "option": ({"training": {"epochs": 1, "best": True}}, "no option 'best'"),
    "sparsity that is a word": ({"sparsity": "high"}, "finite number"),
    "rate that is a word": ({"rate": "a fifth"}, "finite number"),
    "a number of seeds": ({"seeds": 3}, r"seeds=\(0, 1, 2\)"),
    "seeds that are no numbers": ({"seeds": ("a",)}, "each once"),
    "controls that are a word": ({"controls": "reinit"}, "no list"),
    "rounds that are none": ({"control_rounds": [3]}, "there are 2 rounds"),
    "protect that is a word": ({"protect": "4"}, "one word"),
    "protect that is misspelt": ({"protect": ["claßify"]}, "matches no module"),
    "a module of another model": ({"protect": [plain(0)[2]]}, "lambda model"),
    "a loop that is none": ({"train": 3, "training": None, "steps": 3}, "train= is no function"),
    "own with no steps": ({"train": own, "training": None, "steps": 0}, "steps=0"),
    "own without steps": ({"train": own, "training": None}, "steps="),
    "own and built in": ({"train": own, "steps": 3}, "built-in"),
    "control rounds": ({"control_rounds": [0]}, "from 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name, tmp_path):
    options, words = REFUSED[name]
    with pytest.raises(RecipeError, match=words):
        search(tmp_path, **options)


PROTECTED = {
    "name": ["0"],
    "parameter": ["0.weight"],
    "pattern": ["0*"],
    "function of modules": lambda model: [model[0]],
    "function of parameters": lambda model: [model[0].weight],
}


@pytest.mark.parametrize("kind", PROTECTED)
def test_what_is_protected_stays_whole(kind, tmp_path):
    found = search(tmp_path, protect=PROTECTED[kind], training={"steps": 1}, sparsity=0.3)
    assert list(kept(found)["masks"]) == ["4.weight"]
    assert found.rows[-1]["kept"] == 14


def test_a_class_is_protected_and_nothing_is_left(tmp_path):
    with pytest.raises(SecateurError):
        search(tmp_path, protect=[nn.Linear], training={"steps": 1})


@pytest.mark.parametrize("build", [None, plain(0), plain])
def test_what_builds_no_model_is_refused(build, tmp_path):
    """A model in the place of a function; a function that returns none is refused at the door of all models."""
    built = (lambda seed: None) if build is plain else build
    with pytest.raises((RecipeError, InputError), match=r"build=|the model is a"):
        sc.lottery(built, data(), folder=tmp_path, training=TRAINING)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileRefusedError, match="cannot write"):
        search(tmp_path / "file")


def test_no_data_and_no_figure_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="no data to train"):
        sc.lottery(build, folder=tmp_path)
    with pytest.raises(RecipeError, match="no figure"):
        sc.lottery(plain, folder=tmp_path, train=lambda model, span: None, steps=2)
