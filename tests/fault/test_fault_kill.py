"""SIGKILL at random moments of publish_dir: the folder is absent or whole, and the next run cleans up."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.files import publish_dir
from secateur.files.manifest import foreign

FILES = 12
WRITER = """
import sys
from pathlib import Path
from secateur.files import atomic, disk, publish_dir
if sys.argv[2] == "aside":
    disk.exchange = lambda first, second: False
number = int(sys.argv[3])
print("ready", flush=True)
while True:
    number += 1
    with publish_dir(sys.argv[1], force=True) as temp:
        for i in range(12):
            (temp / f"{i}.bin").write_bytes(number.to_bytes(4, "little") * 2000)
        (temp / "report.json").write_text(str(number))
    print(number, flush=True)
"""


def whole(target: Path) -> int | None:
    """The number that every file of the folder holds; None where there is no folder."""
    if not target.exists():
        return None
    number = int((target / "report.json").read_text())
    assert len(list(target.iterdir())) == FILES + 2
    assert foreign(target) == ""
    for i in range(FILES):
        assert (target / f"{i}.bin").read_bytes() == number.to_bytes(4, "little") * 2000
    return number


@pytest.mark.parametrize("way", ["exchange", "aside"])
def test_kill_at_random_moments(tmp_path, way):
    target, chance, last = tmp_path / "out", random.Random(way), 0
    for attempt in range(6):
        command = [sys.executable, "-c", WRITER, str(target), way, str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            # Every second time only after a first success, so that slow machines test something as well.
            first = process.stdout.readline() if attempt % 2 else ""
            time.sleep(chance.uniform(0.0, 0.12))
            process.kill()
            told = [int(line) for line in (first + process.stdout.read()).split()]
        found = whole(target)
        if found is None:
            # Between the two renames of the slow way, the old folder waits beside; nothing is lost.
            aside = list(tmp_path.glob(".out.old-*"))
            assert (way == "aside" and len(aside) == 1) or not told
            found = whole(aside[0]) if aside else 0
        assert found is not None
        assert found >= (told[-1] if told else last)
        last = found
    with publish_dir(target, force=True) as temp:
        (temp / "report.json").write_text("0")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert last > 0
