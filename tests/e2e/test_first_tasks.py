"""What a newcomer does first: the wheel, an own model by one command, and three tasks from the pages alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest
from e2e_tools import ROOT, images

pytestmark = pytest.mark.slow

TASKS = {"half_the_macs": (), "heads_of_bert": ("transformers",), "best_criterion": ("scipy",)}
MYNET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
        )


def build():
    return Net()
"""
USE = """
import torch, secateur as sc
from mynet import Net

assert "site-packages" in sc.__file__, sc.__file__
small = sc.load("runs/mine", model=Net)
assert small(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
"""


def run(words: list[object], cwd: Path, **environment: str) -> str:
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=whole, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_the_task(task: str, tmp_path: Path) -> None:
    for library in TASKS[task]:
        pytest.importorskip(library)
    run([sys.executable, "-W", "ignore", ROOT / f"tests/e2e/tasks/{task}.py"], tmp_path, PYTHONPATH=str(ROOT / "src"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("wheel")
    # From a copy: building leaves folders behind.
    files = run(["git", "ls-files", "src", "pyproject.toml", "README.md", "LICENSE"], ROOT).split()
    for name in files:
        (out / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "clone" / name).write_bytes((ROOT / name).read_bytes())
    run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, out / "clone"], out
    )
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"secateur"}
    shipped = {name for name in names if name.startswith("secateur/")}
    assert shipped == {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/secateur").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_from_the_wheel_to_an_own_pruned_model(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    home = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    zipfile.ZipFile(wheel).extractall(home)
    # Torch and the other dependencies are those of this environment; the wheel's own files come before them.
    (home / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    secateur = [place / "bin/python", "-c", "from secateur.cli.main import main; raise SystemExit(main())"]
    (tmp_path / "mynet.py").write_text(MYNET)
    images(tmp_path / "mine.npz")

    assert "prune" in run([*secateur, "--help"], tmp_path, PYTHONPATH="")
    assert "channel-half-macs" in run([*secateur, "recipes", "list"], tmp_path, PYTHONPATH="")
    begun = time.monotonic()
    words = "prune mynet.py:build --data npz:mine.npz --macs 0.5 --out runs/mine"
    said = run([*secateur, *words.split()], tmp_path, PYTHONPATH="")
    assert time.monotonic() - begun < 180
    assert "accuracy" in said
    run([place / "bin/python", "-c", USE], tmp_path, PYTHONPATH="")
