"""torchrun ... -m secateur: what several processes share, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from secateur.cli.crew import Crew
from secateur.cli.main import main

NETWORK = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
"""


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "m.py:f", "--data", "npz:d.npz", "--space", "s.yaml", "--out", "o"], "runs in one process"),
        (["measure", "m.py:f"], "runs in one process"),
        (["prune", "m.py:f", "--data", "npz:d.npz", "--max-drop", "1", "--out", "o"], "--max-drop"),
        (["prune", "m.py:f", "--data", "text:d", "--recipe", "language-model", "--out", "o"], "a solver of layers"),
    ],
)
def test_what_one_process_does_alone_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("together")
def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    crew = Crew.started()
    assert (crew.helps, crew.device("cuda"), crew.device("cpu"), crew.device(None)) == (True, "cuda:1", "cpu", None)
    assert Crew().device("cuda") == "cuda"


def test_a_lone_process_is_no_crew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # schedulers set it without a group
    assert not Crew.started().several


def torchrun(folder: Path, out: str, *more: str) -> subprocess.Popen[str]:
    import numpy as np

    draw = np.random.default_rng(0)
    np.savez(folder / "d.npz", x=draw.normal(size=(400, 1, 6, 6)).astype("float32"), y=draw.integers(0, 3, 400))
    (folder / "net.py").write_text(NETWORK)
    words = ["prune", "net.py:build", "--data", "npz:d.npz", "--criterion", "taylor", "--sparsity", "0.4"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if out == "two" else []
    return subprocess.Popen(
        [sys.executable, *start, "-m", "secateur", *words, "--recover", "none", "--out", out, *more],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.mark.slow
@needs_gloo
def test_two_processes_write_the_plan_of_one(tmp_path: Path) -> None:
    for out in ("one", "two"):
        running = torchrun(tmp_path, out)
        told = running.communicate(timeout=200)
        assert running.returncode in (0, 7), told[1][-2000:]
    one, two = (json.loads((tmp_path / out / "plan.json").read_text("utf-8")) for out in ("one", "two"))
    assert {name for name in one if one[name] != two.get(name)} == set()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["one", "two"]


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_and_nothing_is_half_written(tmp_path: Path, rank: int) -> None:
    import psutil

    running = torchrun(tmp_path, "two", "--set", "criterion.reduce=per-sample")
    for _ in range(900):
        family = psutil.Process(running.pid).children() if running.poll() is None else []
        mine = [one for one in family if one.environ().get("RANK") == str(rank)]
        if mine and mine[0].cpu_times().user > 1.0:  # past its imports or among them: before it writes in any case
            break
        time.sleep(0.05)
    os.kill(mine[0].pid, signal.SIGKILL)
    _, error = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "Signal 9" in error or "SIGKILL" in error, error[-2000:]
    assert not (tmp_path / "two").exists()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
