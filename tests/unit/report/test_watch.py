"""Who watches a training sees all of it, and changes nothing about it."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FileRefusedError, RecipeError, UnsupportedError
from secateur.model.hashing import hash_model
from secateur.report import Live
from secateur.report.charts import training
from secateur.report.record import TrainingPoint
from secateur.report.safe_text import significant
from secateur.report.trackers import tracked
from secateur.report.watch import MOST, LivePage

GRADUAL = {
    "granularity": "element",
    "criterion": "magnitude",
    "target": {"sparsity": 0.5},
    "training": {"method": "gradual", "epochs": 2, "every": 1, "optimizer": {"name": "sgd", "lr": 0.05}},
    "recover": [{"method": "finetune", "epochs": 1, "optimizer": {"name": "sgd", "lr": 0.05}}],
    "measure": {"latency": False},
}


class Listening:
    """A tracker that keeps what it is told."""

    name = "listening"

    def __init__(self, breaks=False):
        self.breaks, self.logged, self.settings, self.finished = breaks, [], None, 0

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None):
        if self.breaks:
            raise OSError("no server")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def batches(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(4)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def run(**more):
    torch.manual_seed(5)
    return sc.prune(net(), data={"train": batches(0), "test": batches(1)}, recipe=GRADUAL, **more)


def drawn(text):
    """Curve -> step -> what the page says there."""
    found = {}
    pattern = r'step (\d+): (loss|quality|sparsity|learning rate) (not finite|[\w.+-]+)"'
    for step, name, value in re.findall(pattern, text):
        found.setdefault(name, {})[int(step)] = value
    return found


def column(tracker, name):
    return {step: values[name] for step, values in tracker.logged if name in values}


def test_a_tracker_hears_every_step_and_the_weights_do_not_know(tmp_path):
    pytest.importorskip("accelerate")
    tracker, plain = Listening(), run()
    seen = run(track=tracker, checkpoint=tmp_path / "run")
    assert hash_model(seen.model) == hash_model(plain.model)
    points = seen.report.training
    assert column(tracker, "train/loss") == {p.step: p.loss for p in points}
    assert column(tracker, "train/quality") == {p.step: p.quality for p in points if p.quality is not None}
    assert [p.step for p in points if p.quality is not None] == [3, 7, 11]  # each pass has four batches
    assert max(column(tracker, "train/sparsity").values()) == 0.5
    assert list(column(tracker, "after/accuracy").values()) == [seen.report.after.quality["accuracy"]]
    assert tracker.settings["target.sparsity"] == 0.5
    assert tracker.finished == 1


def test_a_tracker_that_breaks_does_not_end_the_training():
    pytest.importorskip("accelerate")
    with pytest.warns(UserWarning, match="listening logs no more: no server"):
        seen = run(track=[Listening(breaks=True)])
    assert hash_model(seen.model) == hash_model(run().model)


@pytest.mark.parametrize(
    ("track", "error", "words"),
    [
        ("tensorbored", RecipeError, "unknown tracker"),
        (3.5, RecipeError, "no tracker"),
        ("wandb", UnsupportedError, "pip install wandb"),
        (["mlflow"], UnsupportedError, "pip install mlflow"),
        ({"name": "tensorboard", "colour": 1, "logging_dir": "/dev/null/x"}, UnsupportedError, "does not start"),
    ],
)
def test_what_is_no_tracker_is_said_before_the_training(track, error, words, monkeypatch):
    tracking = pytest.importorskip("accelerate.tracking")
    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard"])
    with pytest.raises(error) as caught:
        run(track=track, progress=lambda stage, done, total: pytest.fail("the run began"))
    assert words in f"{caught.value.what} {caught.value.hint}"


def test_without_accelerate_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnsupportedError, match="needs accelerate"):
        run(track="tensorboard")


def test_tensorboard_holds_the_curves(tmp_path):
    pytest.importorskip("accelerate")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = run(track={"name": "tensorboard", "logging_dir": str(tmp_path)}, title="mine")
    found = reader.EventAccumulator(str(tmp_path / "mine")).Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == pytest.approx({p.step: p.loss for p in seen.report.training})


@pytest.mark.parametrize(
    ("title", "name"), [("a/b.py:build", "a-b.py-build"), ("hf:org/net", "hf-org-net"), ("..", "secateur")]
)
def test_words_of_the_command_line_are_names_that_trackers_take(title, name, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    (started,) = tracked([{"name": "tensorboard", "logging_dir": str(tmp_path)}], {}, title)
    (named,) = tracked([{"name": "tensorboard", "logging_dir": str(tmp_path), "project": "mine"}], {}, title)
    started.close()
    named.close()
    assert {path.name for path in tmp_path.iterdir()} == {name, "mine"}


def said(page):
    """What each point of each curve says, by the name of its curve."""
    found = {}
    for step, name, value in re.findall(r'data-tip="step (\d+): ([a-z ]+?) ([^" ]+|not finite)"', page):
        found.setdefault(name, {})[int(step)] = value
    return found


def corners(page):
    """How many points the first line of a page has."""
    return len(re.findall("[ML]", re.search(r' d="([^"]*)"', page)[1]))


def test_the_page_follows_the_run_and_goes_with_it(tmp_path):
    page, seen = tmp_path / "run" / "progress.html", []

    def look(stage, done, total):
        if page.exists() and not seen:
            seen.append(page.read_text())

    result = run(checkpoint=tmp_path / "run", progress=look)
    assert 'http-equiv="refresh"' in seen[0]
    last = page.read_text()
    assert 'http-equiv="refresh"' not in last
    assert not re.search(r"(src|href)=.https?:", last.split("<script>")[0])
    curves = said(last)
    assert curves["loss"] == {p.step: significant(p.loss, 4) for p in result.report.training}
    assert set(curves) == {"loss", "quality", "sparsity", "learning rate"}
    result.save(tmp_path / "out")
    assert not (tmp_path / "run").exists()


def test_the_page_is_written_now_and_then_and_stays_small(tmp_path):
    now = [0.0]
    page = LivePage(tmp_path / "p.html", "<b>net</b>", every=5.0, clock=lambda: now[0])
    points = [TrainingPoint(step=n, loss=float(n), lr=0.1) for n in range(3 * MOST)]
    page.step("train", points[:1])
    first = (tmp_path / "p.html").read_text()
    now[0] = 4.9
    page.step("train", points)
    assert (tmp_path / "p.html").read_text() == first
    now[0] = 5.1
    page.step("train", points)
    text = (tmp_path / "p.html").read_text()
    assert "<b>net" not in text
    assert MOST / 2 < corners(text) <= MOST + 1
    assert f"step {3 * MOST}:" in text, "the last step is told"
    assert len(text) < 200_000


def test_a_page_that_waits_is_not_written_for_a_short_run(tmp_path):
    now = [0.0]
    point = TrainingPoint(step=0, loss=1.0, lr=0.1)
    for name, end in (("short", 4.0), ("long", 6.0)):
        now[0] = 0.0
        page = LivePage(tmp_path / name, "net", after=5.0, clock=lambda: now[0])
        page.step("train", [point])
        now[0] = end
        page.step("train", [point])
        page.close()
    assert [path.name for path in tmp_path.iterdir()] == ["long"]


def test_a_loop_of_ones_own_is_watched(tmp_path):
    pytest.importorskip("accelerate")
    tracker, page = Listening(), tmp_path / "p.html"
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, sparsity=0.5, end=6, optimizer=optimizer)
    losses = []
    with Live(page, track=tracker, title="mine", settings={"lr": {"first": 0.1}}) as live:
        for step in range(8):
            x, y = batches(0)[step % 4]
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
            live.log(loss, sparsity=pruner.sparsity, quality=0.5 if step == 7 else None)
            losses.append(loss.item())
            assert page.exists()
    assert column(tracker, "train/loss") == dict(enumerate(losses))
    assert column(tracker, "train/quality") == {7: 0.5}
    assert tracker.settings == {"lr.first": 0.1}
    assert tracker.finished == 1
    curves = drawn(page.read_text())
    assert curves["loss"] == {step: significant(loss, 4) for step, loss in enumerate(losses)}
    assert curves["sparsity"][7] == significant(0.5, 4)
    assert set(curves) == {"loss", "quality", "sparsity"}, "a rate that nobody told is not drawn"
    assert "The training has ended" in page.read_text()


def test_a_loop_that_goes_wrong_has_a_gap_and_an_end(tmp_path):
    page = tmp_path / "p.html"
    with pytest.raises(ZeroDivisionError), Live(page) as live:  # noqa: PT012 - the error is the loop's
        live.log(float("nan"), lr=0.1)
        live.log(2.0, lr=0.1, step=5)
        raise ZeroDivisionError
    curves = drawn(page.read_text())
    assert curves["loss"] == {5: significant(2.0, 4)}, "nothing is drawn where the loss was no number"
    assert "The training has ended" in page.read_text()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda folder: Live(), RecipeError),
        (lambda folder: Live(folder / "no" / "p.html"), FileRefusedError),
        (lambda folder: Live(folder / "p.html", track="tensorbored"), RecipeError),
        (lambda folder: Live(folder / "p.html", every="now"), RecipeError),
        (lambda folder: Live(folder / "p.html").log("low"), RecipeError),
        (lambda folder: Live(folder / "p.html").log(torch.ones(2)), RecipeError),
        (lambda folder: [one.log(1.0, step=3) for one in [Live(folder / "p.html")] * 2], RecipeError),
    ],
)
def test_what_cannot_be_watched_is_said(call, error, tmp_path):
    with pytest.raises(error):
        call(tmp_path)


def test_a_curve_that_never_moves_is_drawn_above_zero():
    """A rate of 0.001 on an axis from 0.0005 to 0.0015 reads as one that may be anything."""
    points = [TrainingPoint(step=n, loss=2 - n / 10, lr=0.001, quality=None, sparsity=None) for n in range(5)]
    loss, rate = training(points)
    assert ">0</text>" in rate
    assert ">2</text>" in loss
