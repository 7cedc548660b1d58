"""Loops that are killed at random steps, without warning, end with the bytes of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import killed_loop
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
KILLS = 5  # of each kind: twenty in all


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads do not come along into a fork, so there are none."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def begun(kind, folder):
    """A loop in a process of its own, and what it tells of its steps.

    Forked, since a fresh process takes seconds to import torch, and on a busy machine a minute.
    """
    folder.mkdir(exist_ok=True)
    out, told = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that a fork does not take along: there are none that matter
        pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            os.close(out)
            killed_loop.main(kind, folder, lambda step: os.write(told, f"{step}\n".encode()))
            failed = 0
        finally:
            os._exit(failed)
    os.close(told)
    return pid, os.fdopen(out)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("kind", ["element", "rigl", "channel", "movement"])
def test_a_loop_that_is_killed_ends_with_the_same_bytes(kind, tmp_path):
    pid, lines = begun(kind, tmp_path / "whole")
    assert [int(line) for line in lines] == list(range(1, killed_loop.STEPS + 1))
    lines.close()
    assert ended(pid) == 0
    chance, killed = random.Random(kind), 0
    for step in sorted(chance.sample(range(1, killed_loop.STEPS), KILLS)):
        pid, lines = begun(kind, tmp_path / "killed")
        for line in lines:
            if int(line) >= step:
                os.kill(pid, signal.SIGKILL)
                break
        lines.close()
        killed += ended(pid) == -signal.SIGKILL
    assert killed == KILLS
    # The last one is a fresh process, which knows nothing but the files.
    places = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    argv = [sys.executable, str(HERE / "killed_loop.py"), kind, str(tmp_path / "killed")]
    last = subprocess.run(argv, env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == wanted
