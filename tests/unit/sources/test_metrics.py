"""METRIC words: by name, from a file, from a module; each against what plain Python finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import InputError, RecipeError
from secateur.measure import yardstick
from secateur.model.door import Parts
from secateur.sources import resolve_metric

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
TARGETS = torch.tensor([0, 2, 2, 1])
FILE = """
import torch

class Wrong:
    def __init__(self): self.reset()
    def reset(self): self.wrong = 0
    def update(self, prediction, target): self.wrong += int((prediction.argmax(1) != target).sum())
    def compute(self): return self.wrong

class Library:
    def __init__(self): self.pairs = []
    def add_batch(self, predictions, references): self.pairs += zip(predictions, references)
    def compute(self): return {"hits": float(sum(p == r for p, r in self.pairs)), "words": "none"}

READY = Wrong()
NUMBER = 3

def factory(): return Wrong()
def with_default(limit=2): return Wrong()
def lonely(model): return 0.25
def several(model): return {"map": 0.5, "map50": 0.75}
def breaks(): raise ValueError("no weights")
"""


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures_of_mine.py").write_text(FILE, encoding="utf-8")
    return "figures_of_mine.py"


def measured(*words: str) -> dict[str, float]:
    data = Parts(test=[(LOGITS[:3], TARGETS[:3]), (LOGITS[3:], TARGETS[3:])])
    found = yardstick(nn.Identity(), data, resolve_metric(words))
    assert found.evaluate is not None
    return found.evaluate(nn.Identity())


@pytest.mark.parametrize(
    ("words", "figures"),
    [
        (["accuracy"], {"accuracy": 0.5}),
        (["top2"], {"top2": 0.75}),
        (["accuracy", "top2"], {"accuracy": 0.5, "top2": 0.75}),
        (["FILE:Wrong"], {"Wrong": 2}),
        (["FILE:READY"], {"READY": 2}),
        (["FILE:factory"], {"factory": 2}),
        (["FILE:with_default"], {"with_default": 2}),
        (["py:figures_of_mine:factory"], {"factory": 2}),
        (["FILE:Library"], {"Library_hits": 2.0}),
        (["FILE:lonely"], {"lonely": 0.25}),
        (["FILE:several"], {"map": 0.5, "map50": 0.75}),
        (["accuracy", "FILE:lonely", "FILE:Wrong"], {"accuracy": 0.5, "lonely": 0.25, "Wrong": 2}),
    ],
)
def test_a_word_measures_what_it_names(words: list[str], figures: dict[str, float], where: str) -> None:
    found = measured(*(word.replace("FILE", where) for word in words))
    assert {name: value for name, value in found.items() if name in figures} == pytest.approx(figures)
    assert set(found) == set(figures)


@pytest.mark.slow
def test_a_metric_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    expected = torchmetrics.MeanSquaredError()
    expected.update(LOGITS, LOGITS + 1)
    data = Parts(test=[(LOGITS, LOGITS + 1)])
    found = yardstick(nn.Identity(), data, resolve_metric(["py:torchmetrics:MeanSquaredError"])).evaluate
    assert found is not None
    assert found(nn.Identity()) == pytest.approx({"MeanSquaredError": float(expected.compute())})


@pytest.mark.parametrize(
    ("word", "error", "said"),
    [
        ("acuracy", RecipeError, "did you mean 'accuracy'"),
        ("FILE:NUMBER", RecipeError, "is a int"),
        ("FILE:breaks", InputError, "no weights"),
        ("FILE:nothing", RecipeError, "has no 'nothing'"),
        ("FILE", RecipeError, "did you mean"),
        ("nowhere.py:x", RecipeError, "there is no file"),
    ],
)
def test_what_is_no_metric_is_refused_at_once(word: str, error: type[Exception], said: str, where: str) -> None:
    with pytest.raises(error, match="(?s)" + said):
        resolve_metric([word.replace("FILE", where)])


def test_nothing_asked_is_nothing() -> None:
    assert resolve_metric([]) is None


def test_twice_the_same_name_is_said(where: str) -> None:
    with pytest.raises(RecipeError, match="twice"):
        resolve_metric(["accuracy", "accuracy"])


def test_shares_know_their_samples() -> None:
    found = yardstick(
        nn.Identity(), Parts(test=[(LOGITS, torch.tensor([0, 1, -100, 2]))]), resolve_metric(["top2", "f1"])
    )
    assert found.evaluate is not None
    found.evaluate(nn.Identity())
    assert found.samples() == {"top2": 3}
