"""The direction of the house: a stage imports earlier stages only, and the command line's help imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import secateur

ROOT = Path(secateur.__file__).parent
# A stage imports those before it; docs/explanation/architecture.md says why the order is this one.
ORDER = (
    "version", "errors", "shown", "drawing", "types", "registry", "words", "request", "processes", "model", "files",
    "recipe", "measure", "structure", "statistics", "criteria", "integrations", "masks", "kinds", "amounts", "solve",
    "planning", "training", "recover", "report", "loading", "result", "stages", "asking", "sharded", "run_training",
    "objective", "pipeline", "api", "sources", "from_disk", "interrupted", "advice", "comparison", "tickets",
    "search", "deployment", "testing", "cli", "__main__",
)  # fmt: skip
RANK = {stage: number for number, stage in enumerate(ORDER)}
# The package itself only names where its public names live, and imports them when they are asked for.
SURFACE = "__init__"


def stage_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(stage, line) of every import of secateur in a file, those inside functions and for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            inside = node.module == "secateur"
            names = [f"secateur.{alias.name}" for alias in node.names] if inside else [node.module or ""]
        for name in names:
            if name.startswith("secateur."):
                yield name.split(".")[1], node.lineno


FILES = sorted(path for path in ROOT.rglob("*.py") if stage_of(path) != SURFACE)


def violations(path: Path) -> list[str]:
    here = stage_of(path)
    found = [(stage, line) for stage, line in imports(path) if stage in RANK]
    return [f"{path.name}:{line}: {here} imports {stage}" for stage, line in found if RANK[stage] > RANK[here]]


def test_every_stage_has_a_place() -> None:
    assert {stage_of(path) for path in FILES} <= set(RANK)


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_imports_earlier_stages_only(stage: str) -> None:
    assert [each for path in FILES if stage_of(path) == stage for each in violations(path)] == []


def test_a_wrong_direction_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    wrong = tmp_path / "files" / "x.py"
    wrong.write_text("def f():\n    from secateur.report import build\n    import secateur.cli.main\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert violations(wrong) == ["x.py:2: files imports report", "x.py:3: files imports cli"]


def face_imports(path: Path) -> list[str]:
    """Imports of the package itself: its face imports every stage, so a stage that asks it closes a circle."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [f"{path.name}:{node.lineno}" for alias in node.names if alias.name == "secateur"]
        elif isinstance(node, ast.ImportFrom) and node.module == "secateur":
            found += [f"{path.name}:{node.lineno}" for alias in node.names if alias.name not in RANK]
    return found


@pytest.mark.parametrize("stage", [stage for stage in ORDER if stage != "cli"])
def test_no_stage_asks_the_face_of_the_package(stage: str) -> None:
    assert [each for path in FILES if stage_of(path) == stage for each in face_imports(path)] == []


def test_an_import_of_the_face_is_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "x.py"
    wrong.write_text("import secateur\nfrom secateur import report\ndef f():\n    from secateur import prune\n")
    assert face_imports(wrong) == ["x.py:1", "x.py:4"]


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert secateur.__version__ == project["version"]


@pytest.mark.parametrize(
    "module", ["secateur", "secateur.errors", "secateur.cli.main", "secateur.recipe", "secateur.files"]
)
def test_help_and_recipes_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing() -> None:
    code = """
import os, random, sys, numpy, torch
def state():
    found = torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(), torch.get_num_threads()
    drawn = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return found, drawn, dict(os.environ)
before = state()
import secateur
for name in secateur.__all__:
    getattr(secateur, name)
import secateur.pipeline, secateur.criteria, secateur.sources
assert state() == before
assert not {"transformers", "timm", "torchvision", "onnx", "mlxtend", "torchmetrics"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
