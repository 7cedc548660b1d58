"""Figures by name against scikit-learn and plain formulas, and metrics of other libraries by what they can do."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, RecipeError
from secateur.measure.named import NAMES, Module, adapted, metric_named
from secateur.measure.quality import yardstick
from secateur.model.door import Parts

TORCH = torch.Generator().manual_seed(0)
LOGITS = torch.randn(60, 5, generator=TORCH)
TARGETS = torch.randint(0, 5, (60,), generator=TORCH)


def of(name: str, prediction: torch.Tensor, target: torch.Tensor) -> float:
    metric: Any = metric_named(name)
    metric.update(prediction[:7], target[:7])
    metric.reset()
    for start in range(0, len(target), 7):
        metric.update(prediction[start : start + 7], target[start : start + 7])
    return float(metric.compute())


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "accuracy"])
def test_classes_against_scikit_learn(name: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    chosen = LOGITS.argmax(1).numpy()
    if name == "accuracy":
        expected = metrics.accuracy_score(TARGETS.numpy(), chosen)
    else:
        function = getattr(metrics, f"{name}_score")
        expected = function(TARGETS.numpy(), chosen, average="macro", zero_division=0)
    assert of(name, LOGITS, TARGETS) == pytest.approx(expected)


def test_top_k_and_distances_against_loops() -> None:
    hits = sum(int(t in row.topk(3).indices.tolist()) for row, t in zip(LOGITS, TARGETS.tolist(), strict=True))
    assert of("top3", LOGITS, TARGETS) == pytest.approx(hits / 60)
    truth = torch.randn(60, 5, generator=TORCH)
    assert of("mse", LOGITS, truth) == pytest.approx(float(nn.functional.mse_loss(LOGITS, truth)))
    assert of("mae", LOGITS, truth) == pytest.approx(float(nn.functional.l1_loss(LOGITS, truth)))


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_a_class_that_is_said_and_never_true_counts_and_one_that_is_neither_does_not(name: str) -> None:
    said, true = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 3, 3, 0])
    # Class 0 has a half of each figure. Classes 1 and 2 are said in vain, 3 is missed; of 4 to 8 there is nothing.
    assert of(name, nn.functional.one_hot(said, 9).float(), true) == pytest.approx(0.5 / 4)


@pytest.mark.parametrize("name", ["accuracy", "f1", "precision", "recall", "top2"])
def test_targets_that_mean_nothing_do_not_count(name: str) -> None:
    hidden = TARGETS.clone()
    hidden[::3] = -100
    kept = hidden >= 0
    assert of(name, LOGITS, hidden) == pytest.approx(of(name, LOGITS[kept], hidden[kept]))


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        metric_named(name).update(torch.zeros(4, 3), torch.zeros(5))
    with pytest.raises(InputError, match="no target"):
        metric_named(name).compute()


def test_prune_takes_names_and_mappings_of_them() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5))
    data = [(LOGITS, TARGETS)]
    recipe = {"target": {"sparsity": 0.5}, "granularity": "neuron", "measure": {"latency": False}}
    for judge, names in (("f1", {"f1"}), ({"best": "top5", "all": "recall"}, {"best", "all"})):
        result = sc.prune(net, data=data, test=data, recipe=recipe, evaluate=judge)
        assert set(result.report.after.quality) == names
        assert result.report.quality_on == "the test part"
    with pytest.raises(RecipeError, match="did you mean 'recall'"):
        sc.prune(net, data=data, test=data, recipe=recipe, evaluate="recal")


class Library:
    """As the library `evaluate` hands metrics out."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.pairs: list[tuple[int, int]] = []

    def add_batch(self, *, predictions: list[int], references: list[int]) -> None:
        self.pairs += zip(predictions, references, strict=True)

    def compute(self) -> dict[str, object]:
        found = np.float32(sum(a == b for a, b in self.pairs) / len(self.pairs))
        self.pairs = []
        return {"accuracy": found, "note": "no number"}


def test_metrics_of_the_library_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("evaluate")

    def load(name: str) -> Library:
        if name != "glue":
            raise FileNotFoundError(f"no {name} here")
        return Library("glue")

    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "evaluate", module)
    plain = float((LOGITS.argmax(1) == TARGETS).float().mean())
    for judge in (adapted("glue"), adapted(Library())):
        assert isinstance(judge, Module)
        judge.reset()
        judge.update(LOGITS, TARGETS)
        assert judge.compute() == {"accuracy": pytest.approx(plain)}
        hidden = TARGETS.clone()
        hidden[::3] = -100
        judge.update(LOGITS, hidden)
        kept = hidden >= 0
        right = float((LOGITS.argmax(1) == TARGETS)[kept].float().mean())
        assert judge.compute() == {"accuracy": pytest.approx(right)}, "targets that mean nothing do not count"
        numbers = torch.tensor([1.0, 2.0, float("nan")])
        judge.update(torch.tensor([1.0, 3.0, 5.0]), numbers)
        assert judge.compute() == {"accuracy": 0.5}
    data = Parts(test=[(LOGITS, TARGETS)])
    for given, figure in (("glue", "glue_accuracy"), (Library(), "accuracy"), (Library("accuracy"), "accuracy")):
        judged = yardstick(nn.Identity(), data, given).evaluate
        assert judged is not None
        assert judged(nn.Identity()) == {figure: pytest.approx(plain)}
    with pytest.raises(RecipeError, match="no 'gluee'"):
        metric_named("gluee")
