"""Progress of stages, and the exit code of a run that ends degraded or misses its target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import criteria
from secateur.cli.decisions import Decisions
from secateur.cli.demo import recipe_for
from secateur.cli.job import read_recipe
from secateur.cli.main import main
from secateur.cli.progress import Stages
from secateur.cli.prune import finish
from secateur.kinds.weights import granularity
from secateur.kinds.weights.granularity import STRUCTURAL
from secateur.result import Result
from secateur.types import Degradation

SLOW = Degradation(stage="apply", what="slow path")


@pytest.fixture(scope="module")
def result() -> Result:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    recipe = {"target": {"sparsity": 0.5}, "measure": {"latency": False}}
    return sc.prune(net, torch.zeros(1, 4), recipe=recipe)


@pytest.mark.parametrize(
    ("change", "code", "lead"),
    [
        ({}, 0, "Pruned"),
        (
            {"status": "degraded", "degradations": (Degradation(stage="apply", what="slow path"),)},
            7,
            "Finished but degraded",
        ),
        ({"status": "target_missed"}, 5, "Target missed"),
    ],
)
def test_the_exit_code_says_how_it_ended(
    result: Result, change: dict[str, Any], code: int, lead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = result.report.model_copy(update=change)
    ended = Result(result.model, result.plan, record, result.recipe)
    assert finish(ended, Path("out"), as_json=False) == code
    assert capsys.readouterr().out.startswith(lead)
    assert finish(ended, Path("out"), as_json=True) == code


def test_progress_is_plain_lines_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from secateur.report import stage_progress as report

    seconds = iter(range(0, 1000, 3))

    def timed(stage: str, total: int | None, *, console: Any, interval: float) -> Any:
        return bar(stage, total, console=console, interval=interval, clock=lambda: float(next(seconds)))

    bar = report.progress
    monkeypatch.setattr(report, "progress", timed)
    with Stages() as stages:
        stages("plan", 0, 0)
        step = stages.of("finetune")
        for done in (1, 2, 4):
            step(done, 4)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("finetune: 2/4 (50 %)") and "left" in line for line in lines)
    assert any(line.startswith("finetune: done in") for line in lines)


def test_stages_end_when_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.report import stage_progress as report

    ended = []

    @contextmanager
    def bar(*_: Any, **__: Any) -> Iterator[Any]:
        try:
            yield lambda done, total, note="": None
        finally:
            ended.append(True)

    monkeypatch.setattr(report, "progress", bar)

    def fails() -> None:
        with Stages() as stages:
            stages("plan", 0, 0)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert ended == [True]


@pytest.mark.parametrize(
    ("granularity", "decided", "target"),
    [
        ("channel", {}, {"macs": 0.5}),
        ("channel", {"sparsity": "0.25"}, {"sparsity": 0.25}),
        ("channel", {"macs": "0.3"}, {"macs": 0.3}),
        ("channel", {"params": "0.2"}, {"params": 0.2}),
        ("channel", {"latency": "5"}, {"latency_ms": 5.0}),
        ("channel", {"macs": "0.3", "sparsity": "0.6"}, {"macs": 0.3, "sparsity": 0.6}),
        ("element", {}, {"sparsity": 0.9}),
        ("element", {"sparsity": "0.8"}, {"sparsity": 0.8}),
        ("2:4", {}, {"sparsity": 0.5}),
        ("1:4", {}, {"sparsity": 0.75}),
        ("vector", {}, {"sparsity": 0.5}),
        ("vector", {"sparsity": "0.3"}, {"sparsity": 0.3}),
    ],
)
def test_what_the_demo_asks_for(granularity: str, decided: dict[str, str], target: dict[str, float]) -> None:
    said = Decisions(**decided)  # type: ignore[arg-type]
    recipe = read_recipe(*recipe_for(granularity, said, 2, ["measure.rounds=7"]), None, said)
    assert recipe.target.given() == target
    assert recipe.granularity == granularity
    assert recipe.measure.rounds == 7
    assert recipe.recover[-1].epochs == 2  # type: ignore[union-attr]
    assert recipe.measure.batch_size == 64
    assert recipe.round_to == (8 if granularity == "channel" else None)


def test_the_demo_keeps_to_the_amount_that_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own half of the multiply-accumulates took the place of what was asked for, in silence."""
    for option, what in (("--macs", "macs"), ("--params", "params")):
        assert main(["demo", option, "0.3", "--dry-run", "--json", "--out", str(tmp_path / "out")]) == 0
        cost = json.loads(capsys.readouterr().out)["plan"]["cost"]
        before, after = cost[what]
        assert after <= 0.3 * before, cost


@pytest.mark.parametrize("name", [*STRUCTURAL, *granularity.names(), "2:4"])
def test_every_granularity_can_be_asked_for(name: str) -> None:
    assert read_recipe(None, [f"granularity={name}", "target={sparsity: 0.5}"], None).granularity == name


@pytest.mark.parametrize("criterion", criteria.names())
def test_every_criterion_can_be_asked_for(criterion: str) -> None:
    assert read_recipe(None, [f"criterion={criterion}"], None).criterion == criterion
