"""A model and data that are not the demo's: in, pruned, out, loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_tools import QUICK, Cli, contents

MODEL, DATA = "py:examples.lenet:build", "npz:d.npz"
FILES = {
    "environment.json", "log.jsonl", "manifest.json", "model.safetensors", "plan.json", "recipe.yaml", "report.html",
    "report.json", "README.md",
}  # fmt: skip


def test_prune_measure_and_export_agree(cli: Cli, work: Path) -> None:
    done = cli("prune", MODEL, "--data", DATA, "--set", "target.macs=0.5", "--out", "out/lenet", *QUICK)
    assert done.code == 0, done.err
    assert done.out.startswith("Pruned, ")
    assert {path.name for path in Path("out/lenet").iterdir()} == FILES
    report = json.loads(Path("out/lenet/report.json").read_text())
    before, after = report["before"], report["after"]
    assert after["macs"] <= before["macs"] / 2
    assert after["params"] < before["params"] == 61_706
    assert report["certificate"]["max_abs_error"] <= 1e-5
    assert report["status"] == "ok"
    assert set(after["quality"]) == {"accuracy"}

    again = cli("measure", "out/lenet", "--model", MODEL, "--data", DATA, "--rounds", 2, "--json")
    assert again.code == 0, again.err
    found = json.loads(again.out)
    for key in ("params", "nonzero", "macs", "size_bytes", "quality"):
        assert found[key] == after[key], key

    exported = cli("export", "out/lenet", "--model", MODEL, "--out", "flat.safetensors", "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["size_bytes"] == Path("flat.safetensors").stat().st_size == after["size_bytes"]


def test_the_saved_recipe_gives_the_run_again(cli: Cli, work: Path) -> None:
    first = cli("prune", MODEL, "--data", DATA, "--set", "criterion.norm=l1", "--out", "a", *QUICK, "--seed", 3)
    assert first.code == 0, first.err
    second = cli("prune", MODEL, "--data", DATA, "--recipe", "a/recipe.yaml", "--out", "b", "--threads", 1)
    assert second.code == 0, second.err
    assert Path("a/plan.json").read_bytes() == Path("b/plan.json").read_bytes()


def test_plan_is_byte_identical_and_follows_the_seed(cli: Cli, work: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert cli("prune", MODEL, "--data", DATA, "--out", name, "--seed", seed, *QUICK).code == 0
    plans = {name: Path(name, "plan.json").read_bytes() for name in ("one", "two", "three")}
    assert plans["one"] == plans["two"]
    assert plans["one"] != plans["three"]


@pytest.mark.parametrize(
    ("granularity", "target", "removed"),
    [
        ("element", "{sparsity: 0.9}", 55_323),  # of 61,470 weights
        # Whole quadruples along the inputs only: 16x25x1, 120x100, 84x30 and 10x21 of them, two weights each.
        ("2:4", "{sparsity: 0.5}", 2 * (400 + 12_000 + 2_520 + 210)),
        ("{name: block, shape: [4, 4]}", "{count: 100}", 100),
    ],
)
def test_masks_are_exact_and_claim_no_speed(cli: Cli, work: Path, granularity: str, target: str, removed: int) -> None:
    changes = ("--set", f"granularity={granularity}", "--set", f"target={target}", "--set", "recover=[]")
    done = cli("prune", MODEL, "--data", DATA, *changes, "--out", "out", "--threads", 1, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["units"]["removed"] == removed
    assert report["applied"] == "mask"
    assert any("no speed expected" in warning for warning in report["warnings"])
    assert report["after"]["params"] == report["before"]["params"]


def test_json_goes_to_stdout_and_all_else_to_stderr(cli: Cli, work: Path) -> None:
    done = cli("prune", "demo:lenet", "--data", DATA, "--out", "out", "--json", *QUICK)
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["out"] == "out"
    del data["out"]
    assert data == json.loads(Path("out/report.json").read_text())
    assert "random weights" in done.err


def test_dry_run_prints_the_plan_and_writes_nothing(cli: Cli, work: Path) -> None:
    before = contents(work)
    done = cli("prune", MODEL, "--data", DATA, "--out", "out", "--dry-run", *QUICK)
    assert done.code == 0, done.err
    assert "removes" in done.out
    assert "certificate: error" in done.out
    assert "nothing was changed or written" in done.out
    as_json = cli("prune", MODEL, "--data", DATA, "--out", "out", "--dry-run", "--json", *QUICK)
    assert json.loads(as_json.out)["plan"]["units"]["removed"] > 0
    assert contents(work) == before


def test_force_replaces_an_output_folder_and_nothing_else(cli: Cli, work: Path) -> None:
    assert cli("prune", MODEL, "--data", DATA, "--out", "out", *QUICK).code == 0
    old = contents(Path("out"))
    assert cli("prune", MODEL, "--data", DATA, "--out", "out", *QUICK).code == 3
    assert contents(Path("out")) == old
    assert cli("prune", MODEL, "--data", DATA, "--out", "out", "--force", "--seed", 9, *QUICK).code == 0
    assert contents(Path("out")) != old
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert cli("prune", MODEL, "--data", DATA, "--out", "mine", "--force", *QUICK).code == 3
    assert Path("mine/thesis.txt").read_text() == "years of work"


def test_estimate_is_what_prune_then_brings(cli: Cli, work: Path) -> None:
    guess = cli("estimate", MODEL, "--data", DATA, "--set", "target.macs=0.6", "--threads", 1, "--json")
    assert guess.code == 0, guess.err
    said = json.loads(guess.out)
    done = cli("prune", MODEL, "--data", DATA, "--set", "target.macs=0.6", "--out", "out", "--json", *QUICK)
    report = json.loads(done.out)
    for key in ("params", "macs", "size_bytes"):
        assert said["predicted"][key] == report["after"][key], key
    assert said["plan_cost"]["macs"] == [report["before"]["macs"], report["after"]["macs"]]
    assert said["speed"]["method"].startswith("both models timed")


def test_estimate_of_masks_expects_no_speed(cli: Cli, work: Path) -> None:
    done = cli("estimate", MODEL, "--recipe", "element-90", "--threads", 1)
    assert done.code == 0, done.err
    assert "speed: zeros only, no speed expected" in done.out


def test_inspect_names_groups_and_locks(cli: Cli, work: Path) -> None:
    data = json.loads(cli("inspect", MODEL, "--json").out)
    assert {"conv1", "conv2"} <= {group["name"] for group in data["groups"]}
    assert all(lock["reasons"] for lock in data["locked"])
    text = cli("inspect", "py:e2e_nets:bare", "--data", DATA)
    assert text.code == 0, text.err
    assert "can be cut" in text.out
    assert cli("inspect", "py:e2e_nets:bare").code == 3


@pytest.mark.parametrize("recipe", ["channel-half-macs", "element-90", "two-four", "block-rows"])
def test_every_bundled_recipe_runs(cli: Cli, work: Path, recipe: str) -> None:
    last = 1 if recipe == "channel-half-macs" else 0
    changes = ("--set", f"recover.{last}.epochs=1", "--set", "measure.rounds=2")
    done = cli("prune", MODEL, "--data", DATA, "--recipe", recipe, *changes, "--out", "out", "--threads", 1)
    assert done.code == 0, done.err
