"""Two models in the same rounds: what is said follows from intervals, and nothing is said on a machine that wavers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.cli.main import main
from secateur.cli.measure import told
from secateur.deployment import SparseLinear
from secateur.errors import RecipeError
from secateur.measure.machine import machine, ticks
from secateur.measure.versus import Ratio, judge, versus


class Fake(nn.Module):
    """Moves a clock of its own by what it is told."""

    def __init__(self, clock: list[float], draw: Callable[[], float]) -> None:
        super().__init__()
        self.tick = lambda: clock.__setitem__(0, clock[0] + draw())

    def forward(self, x: Tensor) -> Tensor:
        self.tick()
        return x


def compared(mine: Callable[[], float], other: Callable[[], float], rounds: int = 20):
    clock = [0.0]
    return versus(
        Fake(clock, mine), Fake(clock, other), torch.zeros(2, 1), rounds=rounds, timer=lambda: clock[0]
    )  # fmt: skip


def noisy(mean: float, spread: float, seed: int) -> Callable[[], float]:
    chance = random.Random(seed)
    return lambda: mean * (1 + spread * (2 * chance.random() - 1))


@pytest.mark.parametrize(
    ("times", "spread", "verdict"),
    [(0.8, 0.01, "faster"), (1.2, 0.01, "slower"), (1.0, 0.01, "no difference"), (0.8, 0.9, "cannot be told")],
)
def test_what_is_said_follows_from_ratio_and_null(times: float, spread: float, verdict: str) -> None:
    found = compared(noisy(1.0, spread, 1), noisy(times, spread, 2))
    assert found.verdict == verdict
    assert found.null.low <= found.null.median <= found.null.high
    if spread < 0.1:
        assert found.ratio.median == pytest.approx(times, rel=0.02)
        assert found.ratio.low <= found.ratio.median <= found.ratio.high
        assert found.second_ms == pytest.approx(1e3 * times, rel=0.02)
    assert (found.rounds, found.batch_size) == (20, 2)


def test_a_model_against_itself_is_hardly_ever_called_different() -> None:
    said = [compared(noisy(1, 0.04, seed), noisy(1, 0.04, 100 + seed)).verdict for seed in range(16)]
    assert sum(each in ("faster", "slower") for each in said) <= 2


def test_a_machine_that_slows_down_between_rounds_slows_all_alike() -> None:
    speed = [1.0]

    def drifting(share: float) -> Callable[[], float]:
        def draw() -> float:
            speed[0] *= 1.001
            return share * speed[0]

        return draw

    found = compared(drifting(1.0), drifting(0.9), rounds=50)
    assert found.verdict == "faster"
    assert found.ratio.median == pytest.approx(0.9, rel=0.01)


@pytest.mark.parametrize(
    ("ratio", "null", "verdict"),
    [
        ((0.9, 0.89, 0.91), (1.0, 0.98, 1.02), "faster"),
        ((0.97, 0.96, 0.99), (1.0, 0.98, 1.02), "no difference"),
        ((1.1, 1.05, 1.2), (1.0, 0.98, 1.02), "slower"),
        ((0.5, 0.4, 0.6), (1.02, 1.01, 1.03), "faster"),
        ((1.02, 1.015, 1.025), (1.02, 1.01, 1.03), "no difference"),
        ((1.04, 1.035, 1.05), (1.02, 1.01, 1.03), "slower"),
        ((0.5, 0.4, 0.6), (1.0, 0.95, 1.01), "cannot be told"),
        ((0.5, 0.4, 0.6), (1.0, 0.99, 1.05), "cannot be told"),
    ],
)
def test_rules(ratio: tuple[float, ...], null: tuple[float, ...], verdict: str) -> None:
    assert judge(Ratio(*ratio), Ratio(*null)) == verdict


def test_intervals_are_those_of_resampled_medians() -> None:
    chance = np.random.default_rng(5)
    values = iter(chance.normal(1.0, 0.01, 10_000))
    found = compared(lambda: 1.0, lambda: float(next(values)), rounds=100)
    # The median of n normal numbers wavers by 1.2533 sigma / sqrt(n).
    half = 1.96 * 1.2533 * 0.01 / 10
    assert found.ratio.high - found.ratio.low == pytest.approx(2 * half, rel=0.5)
    assert (found.null.low, found.null.high) == (1.0, 1.0)


def test_the_first_model_counts_by_the_mean_of_both_of_its_runs() -> None:
    turns = iter([1.0, 3.0] * 1000)
    found = compared(lambda: next(turns), lambda: 2.0)
    assert (found.ratio.low, found.ratio.median, found.ratio.high) == pytest.approx((1, 1, 1))


def test_time_that_was_stolen_is_a_share_of_what_passed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([(1000, 100), (1400, 200)])
    monkeypatch.setattr("secateur.measure.versus.ticks", lambda: next(looks))
    assert compared(lambda: 1.0, lambda: 1.0).stolen == 0.25


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_too_few_rounds_are_refused_and_not_made_more_in_silence(rounds: int) -> None:
    with pytest.raises(RecipeError, match=f"rounds={rounds} is too few") as refused:
        compared(lambda: 1.0, lambda: 1.0, rounds=rounds)
    assert "6 or more" in refused.value.hint
    assert compared(lambda: 1.0, lambda: 1.0, rounds=6).rounds == 6


def test_bad_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="threads"):
        versus(nn.Identity(), nn.Identity(), torch.zeros(1), threads=0)


def test_the_machine_is_named() -> None:
    found = machine()
    assert all(found.values())
    assert ticks()[0] >= ticks()[1]


NET = """
import torch
from torch import nn

def build(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)), torch.ones(3, 4)

def wide():
    return build(16)
"""


def test_the_command_line_compares_two(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("versus_net.py").write_text(NET)
    words = ["measure", "versus_net.py:build", "versus_net.py:wide"]
    assert main([*words, "--rounds", "6", "--batch-size", "1", "--processor-time", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(each["what"], each["params"]) for each in said["models"]] == [(words[1], 58), (words[2], 114)]
    assert said["versus"]["verdict"] in ("faster", "slower", "no difference", "cannot be told")
    assert (said["versus"]["machine"]["threads"], said["versus"]["batch_size"]) == (1, 1)
    lines = told(compared(lambda: 1.0, lambda: 0.5), "wall")
    assert ("so the second is", "", "faster") in lines
    assert any("null" in line[1] for line in lines)
    # A deployed folder: counted as what it stands for, weighed as it is.
    from versus_net import build

    net = build()[0]
    sc.save_deployed(nn.Sequential(SparseLinear.of(net[0], "bitmask"), net[1]), "fast")
    assert main(["measure", words[1], "fast", "--model", words[1], "--rounds", "6", "--json"]) == 0
    dense, packed = json.loads(capsys.readouterr().out)["models"]
    assert (dense["params"], dense["macs"]) == (packed["params"], packed["macs"])
    assert dense["size_bytes"] != packed["size_bytes"]
    assert main([*words, "--task", "perplexity"]) == 2
    assert main(["measure", words[1], "runs/none"]) == 2
    assert "give --model" in capsys.readouterr().err.lower()
