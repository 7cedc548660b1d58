"""The documented way to bring one's own data measures quality, in every command that can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_tools import QUICK, Cli

MODEL = "py:e2e_nets:bare"
DATA = """
import numpy as np
import torch


def batches(start, stop, size=20):
    with np.load("d.npz") as file:
        x, y = torch.from_numpy(file["x"]).float() / 255, torch.from_numpy(file["y"])
    return [(x[i:i + size], y[i:i + size]) for i in range(start, stop, size)]


def data():
    return {"train": batches(0, 60), "calibration": batches(0, 20), "test": batches(60, 80)}


def unlabelled():
    return {"train": [x for x, _ in batches(0, 60)]}


def named():
    return {part: [{"x": x, "labels": y} for x, y in found] for part, found in data().items()}
"""


@pytest.fixture
def own(work: Path) -> Path:
    (work / "own_data.py").write_text(DATA)
    return work


@pytest.mark.parametrize("factory", ["data", "named"])
def test_a_mapping_of_loaders_measures_accuracy(cli: Cli, own: Path, factory: str) -> None:
    word = f"py:own_data:{factory}"
    done = cli("prune", MODEL, "--data", word, "--set", "control=dense", "--out", "out", "--json", *QUICK)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert set(report["before"]["quality"]) == set(report["after"]["quality"]) == {"accuracy"}
    assert (report["quality_on"], report["quality_missing"], report["warnings"]) == ("the test part", "", [])
    assert report["control"]["steps"] == ["bn_refresh", "finetune"]
    assert set(report["control"]["quality"]) == {"accuracy"}
    assert "the dense model with the same steps reaches" in Path("out/report.html").read_text()
    assert "accuracy, dense control" in Path("out/report.html").read_text()

    again = json.loads(cli("measure", "out", "--model", MODEL, "--data", word, "--rounds", 2, "--json").out)
    assert again["quality"] == report["after"]["quality"]
    assert again["quality_on"] == "the test part"
    assert "accuracy on the test part" in cli("measure", MODEL, "--data", word, "--rounds", 2).out


def test_without_labels_the_reason_is_given(cli: Cli, own: Path) -> None:
    word = "py:own_data:unlabelled"
    done = cli("prune", MODEL, "--data", word, "--set", "recover=[]", "--out", "out", "--set", "measure.latency=false")
    assert done.code == 0, done.err
    assert "quality not measured (the batches hold no target" in done.out
    measured = cli("measure", MODEL, "--data", word, "--rounds", 2)
    assert "not measured (the batches hold no target" in measured.out
    refused = cli("compare", MODEL, "--data", word, "--out", "c")
    assert refused.code == 3
    assert "has no test part" in refused.err


def test_a_split_of_one_file_is_a_warning(cli: Cli, own: Path) -> None:
    done = cli("prune", MODEL, "--data", "npz:d.npz", "--out", "out", "--json", "--set", "recover=[]", *QUICK[:6])
    (note,) = json.loads(done.out)["warnings"]
    assert "d.npz has no test part of its own" in note


def test_macs_do_not_depend_on_the_batch_of_the_loader(cli: Cli, own: Path) -> None:
    found = [
        json.loads(cli("measure", MODEL, "--data", word, "--rounds", 1, "--json").out)
        for word in ("py:own_data:data", "npz:d.npz")
    ]
    assert found[0]["macs"] == found[1]["macs"]
    assert {one["macs_per"] for one in found} == {"sample"}


def test_compare_takes_such_data(cli: Cli, own: Path) -> None:
    words = ("--levels", "0.5", "--criteria", "magnitude", "--seeds", 1, "--probes", 0, "--threads", 1)
    done = cli("compare", MODEL, "--data", "py:own_data:data", "--out", "c", *words, "--json")
    assert done.code == 0, done.err
    assert json.loads(Path("c/manifest.json").read_text())["protocol"]["metric"] == "accuracy"
    rows = Path("c/results.csv").read_text().splitlines()
    assert len(rows) > 4
    assert "accuracy" in rows[0]
