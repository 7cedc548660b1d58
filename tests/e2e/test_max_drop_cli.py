"""--max-drop on the command line: what is said, where it lies, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_tools import Cli

TINY = (
    "--threads", "1", "--set", "recover.1.epochs=1", "--set", "verify.proof=example", "--set", "measure.latency=false",
)  # fmt: skip


@pytest.mark.slow
def test_the_folder_holds_what_was_found(cli: Cli, work: Path) -> None:
    words = (
        "prune",
        "e2e_nets.py:bare",
        "--data",
        "npz:d.npz",
        "--max-drop",
        "60",
        "--confidence",
        "0.5",
        "--out",
        "small",
    )
    done = cli(*words, *TINY)
    assert done.code in (0, 5), done.err  # a network of random weights: whether it is kept is chance, and is said
    limit = json.loads((work / "small/report.json").read_text())["limit"]
    assert done.code == (5 if limit["verdict"] == "missed" else 0)
    assert "at most 60 points of accuracy" in done.out
    assert f"macs: {limit['amount']}" in (work / "small/recipe.yaml").read_text()
    # What is done again by that recipe is the same model, without a search.
    again = cli("prune", "e2e_nets.py:bare", "--data", "npz:d.npz", "--recipe", "small/recipe.yaml", "--out", "again")
    assert again.code == 0, again.err
    files = [(work / folder / "model.safetensors").read_bytes() for folder in ("small", "again")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_too_few_samples_are_told_how_many_are_needed(cli: Cli, work: Path) -> None:
    done = cli("prune", "e2e_nets.py:bare", "--data", "npz:d.npz", "--max-drop", "1", "--out", "small", *TINY)
    assert done.code == 5
    assert "268 or more" in done.err
    assert not (work / "small").exists()
    assert not (work / "small.unfinished").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--max-drop", "1", "--macs", "0.5"), "both say how much goes"),
        (("--max-drop", "200"), "below 100"),
        (("--max-drop", "1", "--smallest", "macz"), "macs"),
        (("--smallest", "macs"), "belong to max_drop"),
        (("--max-drop", "1", "--dry-run"), "finds no amount"),
    ],
)
def test_what_cannot_be_meant_is_refused(cli: Cli, work: Path, more: tuple[str, ...], words: str) -> None:
    done = cli("prune", "e2e_nets.py:bare", "--data", "npz:d.npz", "--out", "small", *more)
    assert done.code == 2
    assert words in done.err
