"""Every example runs, at small size, and does what it says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_tools import ROOT

LONGEST = 60
FAST = {"audio", "own_cnn"}
Row = tuple[dict[str, Any], tuple[str, ...], Callable[[Any], bool]]


def recovered(before: float, after: float) -> bool:
    """Far better than chance before, and little lost after."""
    return before > 0.7 and after > before - 0.1


EXAMPLES: dict[str, Row] = {
    "audio": ({"steps": 30}, (), lambda got: recovered(*got[:2]) and got[2] <= 0.4),
    "bert_classifier": ({"steps": 80}, ("transformers",), lambda got: recovered(*got[:2]) and got[2] == 5 / 16),
    "crepe": ({"batches": 10, "epochs": 2}, ("torchcrepe",), lambda got: got[0] > 0.95 and got[2] > 0.9),
    "detector": ({"steps": 60}, (), lambda got: recovered(*got[:2]) and got[2] <= 0.5),
    "gradual": ({"epochs": 1, "sparsity": 0.8}, ("mlxtend",), lambda found: found > 0.5),
    "lightning_loop": ({"epochs": 1}, ("mlxtend", "lightning"), lambda found: abs(found - 0.5) < 5e-3),
    "own_cnn": ({"steps": 25}, (), lambda got: recovered(*got[:2]) and got[2] <= 0.5),
    "small_gpt": (
        {"epochs": 2, "characters": 40_000},
        ("transformers",),
        lambda got: got["dense"] < got["sparsegpt"] < got["magnitude"] and got["dense"] < 40,
    ),
    "trainer": ({"steps": 6}, ("transformers", "accelerate"), lambda found: abs(found - 0.5) < 1e-3),
    "unet": ({"steps": 20}, (), lambda got: recovered(*got[:2]) and got[2] <= 0.5),
    "vit": ({"steps": 80}, ("transformers",), lambda got: recovered(*got[:2]) and got[2] < 192),
    "whisper": ({"layers": 2, "width": 32}, ("transformers",), lambda got: got[0] == 1 and got[2] < 0.8),
    "yolo": ({}, ("ultralytics",), lambda got: got[0] <= 0.7 and got[1] < 1e-3),
}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in EXAMPLES])
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, libraries, holds = EXAMPLES[name]
    for library in libraries:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    assert holds(load(name).main(**options))


def test_every_example_is_run_short_and_listed() -> None:
    found = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    # lenet.py is a model to prune, which the tests of the command line do.
    assert set(found) == {*EXAMPLES, "lenet"}
    listed = (ROOT / "examples/README.md").read_text("utf-8")
    for name, path in found.items():
        code = path.read_text("utf-8").split('"""', 2)[2]
        assert len([line for line in code.splitlines() if line.strip()]) <= LONGEST, name
        assert f"`{name}.py`" in listed or f"({name}.py)" in listed, name


def test_the_plain_loop_takes_twenty_lines() -> None:
    _, _, code = (ROOT / "examples/gradual.py").read_text("utf-8").split('"""')
    assert len([line for line in code.splitlines() if line.strip()]) == 20
