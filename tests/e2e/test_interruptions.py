"""Ctrl-C and kill -9 while the command line prunes, in processes of their own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from e2e_tools import ROOT, Cli, contents

import secateur as sc
from secateur.sources import build_lenet

FOLDER = {
    "environment.json", "log.jsonl", "manifest.json", "model.safetensors", "plan.json", "recipe.yaml", "report.html",
    "report.json", "README.md",
}  # fmt: skip
# The forward says that the work has begun: from then on the process is in the middle of it.
SLOW = """
from pathlib import Path

import torch
from examples.lenet import LeNet


class Slow(LeNet):
    def forward(self, x):
        Path("begun").touch()
        return super().forward(x)


def build():
    return Slow(), torch.zeros(1, 1, 28, 28)
"""


def listen_to_ctrl_c() -> None:
    """A suite that was started in the background ignores SIGINT, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "e2e_slow.py").write_text(SLOW)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    argv = [sys.executable, "-m", "secateur.cli", "prune", "py:e2e_slow:build", "--data", "npz:d.npz", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*argv, *words], cwd=folder, env=env, text=True, preexec_fn=listen_to_ctrl_c, **pipes)


def wait_until_begun(folder: Path, process: subprocess.Popen[str]) -> None:
    wait_for(folder / "begun", process)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ctrl_c_leaves_no_output_says_how_to_go_on_and_exits_130(work: Path) -> None:
    before = contents(work)
    process = start(work, "--out", "out", "--set", "recover.1.epochs=10000")
    wait_until_begun(work, process)
    wait_for(work / "out.unfinished" / "index.json", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "interrupted" in err
    assert "secateur resume out" in err
    assert "Traceback" not in err
    shutil.rmtree(work / "out.unfinished")
    (work / "begun").unlink()
    (work / "e2e_slow.py").unlink()
    assert contents(work) == before


@pytest.mark.slow
def test_kill_9_leaves_a_whole_folder_or_none(work: Path) -> None:
    words = ("--out", "out", "--force", "--set", "recover.1.epochs=2", "--set", "measure.rounds=2")
    process = start(work, *words)
    wait_until_begun(work, process)
    begun = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode == 0
    duration, chance, seen = time.monotonic() - begun, random.Random(7), 0
    for number in range(8):
        folder = work / f"run{number}"
        folder.mkdir()
        (folder / "d.npz").write_bytes((work / "d.npz").read_bytes())
        process = start(folder, *words)
        wait_until_begun(folder, process)
        time.sleep(chance.uniform(0, 1.1) * duration)
        process.kill()
        process.communicate(timeout=60)
        if (folder / "out").exists():
            seen += 1
            assert {path.name for path in (folder / "out").iterdir()} == FOLDER
            sc.load(folder / "out", model=import_module("examples.lenet").LeNet)
        visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        assert visible <= {"begun", "d.npz", "e2e_slow.py", "out", "out.unfinished", "__pycache__"}
    assert seen < 8, "no kill came before the end: the test proves nothing"


@pytest.mark.slow
def test_a_run_after_a_kill_sweeps_up(work: Path) -> None:
    sc.prune(build_lenet(), torch.zeros(1, 1, 28, 28), recipe={"target": {"macs": 0.5}}).save(work / "x")
    stale = work / f".x.partial-{2**22 + 7}-0123456789abcdef"
    stale.mkdir()
    process = start(work, "--out", "x", "--force", "--set", "recover.1.epochs=1", "--set", "measure.rounds=2")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert not stale.exists()


def resumed(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    argv = [sys.executable, "-m", "secateur.cli", "resume", "out"]
    return subprocess.run(argv, cwd=folder, env=env, text=True, capture_output=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_killed_run_of_the_command_line_is_resumed_to_the_same_bytes(work: Path) -> None:
    words = ("--out", "out", "--set", "recover.1.epochs=30", "--set", "measure.latency=false")
    whole = work / "whole"
    whole.mkdir()
    (whole / "d.npz").write_bytes((work / "d.npz").read_bytes())
    process = start(whole, *words)
    wait_for(whole / "out.unfinished" / "index.json", process)
    begun = time.monotonic()
    process.communicate(timeout=240)
    duration, chance, resumes = time.monotonic() - begun, random.Random(3), 0
    for number in range(9):
        folder = work / f"run{number}"
        folder.mkdir()
        (folder / "d.npz").write_bytes((work / "d.npz").read_bytes())
        process = start(folder, *words)
        wait_for(folder / "out.unfinished" / "index.json", process)
        time.sleep(chance.uniform(0.0, 0.7) * duration)
        process.kill()
        process.communicate(timeout=60)
        if (folder / "out").exists():
            duration *= 0.6  # this run had more of the processor than the one that was timed
            continue
        done = resumed(folder)
        assert done.returncode == 0, done.stderr
        resumes += 1
        for name in ("model.safetensors", "plan.json"):
            assert (folder / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
        assert not (folder / "out.unfinished").exists()
        if resumes == 3:
            return
    raise AssertionError(f"of nine kills {resumes} met a run that was training")


def test_there_is_nothing_to_resume_where_nothing_was_begun(work: Path, cli: Cli) -> None:
    done = cli("resume", "nowhere")
    assert done.code == 3
    assert "nothing to resume" in done.err
    assert not (work / "nowhere").exists()
