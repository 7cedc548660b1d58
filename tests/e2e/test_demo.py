"""The demo on the real digits, shortened to one pass before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_tools import Cli, contents


def test_demo_cuts_recovers_and_loads_again(cli: Cli, work: Path) -> None:
    done = cli("demo", "--epochs", 1, "--set", "measure.rounds=10", "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    on_disk = json.loads(Path("runs/demo/report.json").read_text())
    assert {key: data[key] for key in on_disk} == on_disk
    before, after = on_disk["before"], on_disk["after"]
    assert after["macs"] <= before["macs"] / 2
    assert before["quality"]["accuracy"] > 0.85
    assert after["quality"]["accuracy"] > on_disk["after_cut_quality"]["accuracy"]
    assert on_disk["certificate"]["max_abs_error"] <= 1e-5
    assert data["reload"]["max_abs_error"] <= 1e-5
    assert data["reload"]["quality"] == after["quality"]
    assert after["latency_ms"]["batch_size"] == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "sparsity", "achieved"), [("element", 0.9, 0.9), ("2:4", None, 0.5), ("vector", 0.25, 0.25)]
)
def test_demo_of_masks(cli: Cli, work: Path, granularity: str, sparsity: float | None, achieved: float) -> None:
    more = () if sparsity is None else ("--sparsity", sparsity)
    done = cli("demo", "--granularity", granularity, *more, "--epochs", 1, "--out", "out", "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["applied"] == "mask"
    assert data["sparsity"] == pytest.approx(achieved, abs=0.01)
    assert data["after"]["params"] == data["before"]["params"]
    assert data["reload"]["quality"] == data["after"]["quality"]


def test_dry_run_trains_and_writes_nothing(cli: Cli, work: Path) -> None:
    before = contents(work)
    done = cli("demo", "--dry-run")
    assert done.code == 0, done.err
    assert "MACs" in done.out or "macs" in done.out
    assert "random weights" in done.err
    assert contents(work) == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--granularity", "3:2"), 2, "3"),
        (("--granularity", "pixel"), 2, "pixel"),
        (("--sparsity", "50"), 2, "write 0.5"),
        (("--granularity", "element", "--sparsity", "1.0"), 2, "[0, 1)"),
        (("--granularity", "2:4", "--sparsity", "0.6"), 2, "0.5"),
    ],
)
def test_bad_options_are_refused_before_training(
    cli: Cli, work: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    done = cli("demo", *words)
    assert done.code == code, done.err
    assert said in done.err
    assert "train the dense network" not in done.err
    assert not Path("runs").exists()
