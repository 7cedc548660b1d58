"""``secateur export``: from an output folder to every target, also from one of deploy, with words for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from e2e_tools import Cli

import secateur as sc
from secateur.deployment.folders import PROFILES, Profile

MODEL = ("--model", "py:examples.lenet:build")


@pytest.fixture
def cut(work: Path) -> Path:
    from examples.lenet import build as both

    # Zeros need no proof, and this is about what comes after.
    recipe = {"granularity": "element", "target": {"sparsity": 0.7}, "measure": {"latency": False}}
    return sc.prune(both()[0], torch.zeros(2, 1, 28, 28), recipe=recipe).save(work / "cut")


def test_folders_go_out_and_come_back(cli: Cli, cut: Path) -> None:
    from examples.lenet import build as both

    done = cli("export", "cut", *MODEL, "--format", "archive", "--weights", "int8", "--out", "small", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["times_smaller"] > 4
    assert "zeros" in said["uses"]
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        wanted, found = sc.load("cut", both()[0]).eval()(x), sc.load_deployed("small", both()[0]).eval()(x)
    assert torch.allclose(wanted, found, atol=0.05 * float(wanted.abs().max()))
    # What deploy or an archive wrote goes on to any other target.
    again = cli("export", "small", *MODEL, "--out", "plain.safetensors")
    assert again.code == 0, again.err
    assert "cannot use" in again.out


@pytest.mark.parametrize("profile", PROFILES)
def test_a_cut_model_goes_through_any_number_of_folders(cli: Cli, work: Path, profile: Profile) -> None:
    from examples.lenet import build as both

    model, x = both()[0].eval(), torch.randn(2, 1, 28, 28)
    small = sc.plan(model, x, granularity="channel", target={"sparsity": 0.4}, proof="example").apply(model)
    sc.save_deployed(small, "one", profile=profile)
    done = cli("export", "one", *MODEL, "--format", "archive", "--out", "two")
    assert done.code == 0, done.err
    with torch.no_grad():
        wanted, found = small(x), sc.load_deployed("two", both()[0]).eval()(x)
    assert torch.equal(wanted, found)


BAD = [
    (("--format", "onx", "--out", "m"), 2, "onnx"),
    (("--format", "archive", "--dtype", "q8_0", "--out", "m"), 2, "dtype"),
    (("--format", "hf", "--out", "m"), 4, "transformers"),
    (("--format", "archive", "--out", "cut"), 3, "exists"),
]


def test_bad_words_and_targets_that_cannot_are_told(cli: Cli, cut: Path) -> None:
    for words, code, said in BAD:
        done = cli("export", "cut", *MODEL, *words)
        assert done.code == code, words
        assert said in done.err
        assert not Path("m").exists()
