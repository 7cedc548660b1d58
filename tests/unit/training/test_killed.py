"""Loops that are killed at random steps, without warning, end with the bytes of one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
HERE = Path(__file__).parent
KILLS = 5  # of each kind: twenty in all


def begun(kind, folder):
    folder.mkdir(exist_ok=True)
    code = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]; import killed_loop; " + (
        f"from pathlib import Path; killed_loop.main({kind!r}, Path({str(folder)!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["element", "rigl", "channel", "movement"])
def test_a_loop_that_is_killed_ends_with_the_same_bytes(kind, tmp_path):
    whole = begun(kind, tmp_path / "whole")
    assert whole.wait() == 0
    whole.stdout.close()
    chance, killed = random.Random(kind), 0
    steps = sorted(chance.sample(range(1, 16), KILLS))
    for step in steps:
        loop = begun(kind, tmp_path / "killed")
        for line in loop.stdout:
            if int(line) >= step:
                loop.send_signal(signal.SIGKILL)
                break
        loop.stdout.close()
        killed += loop.wait() == -signal.SIGKILL
    last = begun(kind, tmp_path / "killed")
    assert last.wait() == 0
    last.stdout.close()
    assert killed == KILLS
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == wanted
