"""Deploying a cut and masked network: the folder loads again onto the first architecture, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from e2e_tools import Cli
from torch import nn

import secateur as sc
from secateur.deployment import SparseConv2d, SparseLinear, convolving, native, planner
from secateur.deployment.contest import Contest
from secateur.types import Latency

MODEL = "py:examples.lenet:build"


@pytest.fixture
def pruned(work: Path) -> Path:
    from examples.lenet import build as both

    recipe = {"target": {"macs": 0.5}, "measure": {"latency": False}}
    return sc.prune(both()[0], torch.zeros(2, 1, 28, 28), recipe=recipe).save(work / "cut")


@pytest.mark.parametrize("swaps", [True, False])
def test_the_folder_loads_again(
    cli: Cli, work: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    from examples.lenet import build as both

    if swaps and native.why_not():
        pytest.skip(native.why_not())
    ratio, one = (0.5 if swaps else 2.0), Latency(1.0, 1.0, 1.0, 9)
    monkeypatch.setattr(Contest, "ratios", lambda self, layer, found, rows: {each.name: ratio for each in found})
    monkeypatch.setattr(
        planner,
        "latency",
        lambda *_, **__: {"dense": one, "deployed": Latency(0.5, 0.5, 0.5, 9, ratio=(0.5, 0.5, 0.5))},
    )
    argv = ("deploy", "cut", "--model", MODEL, "--data", "npz:d.npz", "--no-table", "--json")
    tried = cli(*argv, "--out", "fast", "--dry-run")
    assert tried.code == 0, tried.err
    assert not Path("fast").exists()
    done = cli(*argv, "--out", "fast", "--profile", "runtime" if swaps else "archive")
    assert done.code == 0, done.err
    layers = json.loads(done.out)["layers"]
    swapped = [each["name"] for each in layers if each["format"]]
    assert bool(swapped) == swaps  # the last layer has ten rows: padded to panels, no format holds it in fewer bytes
    assert all(each["why"] for each in layers)

    x = torch.randn(3, 1, 28, 28)
    again, cut = sc.load_deployed("fast", both()[0]).eval(), sc.load("cut", both()[0]).eval()
    assert [name for name, module in again.named_modules() if isinstance(module, SparseLinear)] == swapped
    assert torch.allclose(again(x), cut(x), atol=1e-5)
    assert cli(*argv, "--out", "fast").code == 3  # it is there already
    assert cli(*argv, "--out", "fast", "--force").code == 0


@pytest.mark.parametrize("weights", ["same", "int8"])
def test_an_estimate_says_what_deploying_would_bring(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    if native.why_not():
        pytest.skip(native.why_not())
    dtypes: set[torch.dtype] = set()

    def told(self: Contest, layer: object, found: list, rows: int) -> dict[str, float]:
        dtypes.update(one.dtype for one in found)
        return {each.name: 0.5 for each in found}

    monkeypatch.setattr(Contest, "ratios", told)
    one = Latency(1.0, 1.0, 1.0, 9)
    other = Latency(0.5, 0.5, 0.5, 9, ratio=(0.5, 0.5, 0.5))
    monkeypatch.setattr(planner, "latency", lambda *_, **__: {"dense": one, "deployed": other})
    argv = ("estimate", MODEL, "--data", "npz:d.npz", "--granularity", "element", "--sparsity", "0.5")
    done = cli(*argv, "--set", "measure.latency=false", "--deploy", weights, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["deployed"]
    assert found["size_bytes"][1] < found["size_bytes"][0]
    assert abs(found["layers"][0]["zeros"] - 0.5) < 0.3
    assert (torch.int8 in dtypes) == (weights == "int8")


CONVOLUTIONS = """
import torch
from torch import nn


def build():
    parts = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(8 * 36, 3)), torch.zeros(2, 1, 8, 8)
"""


@pytest.mark.parametrize("profile", ["runtime", "archive"])
def test_convolutions_are_deployed_where_that_is_asked_for(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    if native.why_not():
        pytest.skip(native.why_not())
    Path("convolutions.py").write_text(CONVOLUTIONS)
    space: dict = {}
    exec(CONVOLUTIONS, space)
    build = space["build"]
    recipe = {"target": {"sparsity": 0.8}, "granularity": "element", "scope": "local", "measure": {"latency": False}}
    sc.prune(*build(), recipe=recipe).save(work / "cut")
    monkeypatch.setattr(convolving, "_measure", lambda *_: 0.5)
    one, other = Latency(1.0, 1.0, 1.0, 9), Latency(0.5, 0.5, 0.5, 9, ratio=(0.5, 0.5, 0.5))
    monkeypatch.setattr(planner, "latency", lambda *_, **__: {"dense": one, "deployed": other})
    argv = ("deploy", "cut", "--model", "py:convolutions:build", "--no-table", "--json", "--profile", profile)
    left = cli(*argv, "--out", "left")
    assert left.code == 0, left.err
    assert not any(each["name"] in ("0", "3") for each in json.loads(left.out)["layers"])
    done = cli(*argv, "--out", "fast", "--convolutions")
    assert done.code == 0, done.err
    packed = [each for each in json.loads(done.out)["layers"] if each["format"] == "planes"]
    assert packed, done.out
    again, cut = sc.load_deployed("fast", lambda: build()[0]).eval(), sc.load("cut", lambda: build()[0]).eval()
    found = {name for name, module in again.named_modules() if isinstance(module, SparseConv2d)}
    assert found == {each["name"] for each in packed}
    assert [type(again[at]) is nn.Identity for at in (1, 4)] == [name in found for name in ("0", "3")]
    x = torch.randn(3, 1, 8, 8)
    assert torch.allclose(again(x), cut(x), atol=1e-5)
