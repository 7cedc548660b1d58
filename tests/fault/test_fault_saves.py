"""SIGKILL at random moments while results are saved and replaced: an old or the new one is there, and it loads."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.files import disk
from secateur.files.manifest import foreign

X = torch.ones(2, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


@pytest.fixture(scope="module")
def results() -> list[sc.Result]:
    """Two results with other weights and other plans: a mixture of them would be neither."""
    torch.manual_seed(0)
    recipe = {"granularity": "channel", "recover": [], "measure": {"latency": False}}
    return [sc.prune(net(), X, recipe={**recipe, "target": {"sparsity": share}}) for share in (0.25, 0.5)]


def save_without_end(results: list[sc.Result], target: Path, progress: int, *, aside: bool) -> None:
    """In a process of its own: one result after the other into the same folder, until somebody kills it."""
    if aside:
        disk.exchange = lambda first, second: False
    os.write(progress, b"r")
    number = 0
    while True:
        number += 1
        results[number % 2].save(target, force=True)
        os.write(progress, b".")


def killed(results: list[sc.Result], target: Path, chance: random.Random, *, aside: bool, after_one: bool) -> bool:
    """Whether at least one save had ended when the kill came."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            save_without_end(results, target, write, aside=aside)
        finally:
            os._exit(1)  # never back into the test
    os.close(write)
    try:
        assert os.read(read, 1) == b"r"
        if after_one:
            os.read(read, 1)
        time.sleep(chance.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "the saving itself failed"
        return after_one or os.read(read, 1) == b"."
    finally:
        os.close(read)


def kill_many(results: list[sc.Result], here: Path, count: int) -> None:
    target, chance = here / "out", random.Random(count)
    (here / "mine.txt").write_text("mine")
    (here / "out-of-mine").mkdir()
    outputs = [result.model(X) for result in results]
    there = False
    for attempt in range(count):
        aside = attempt % 3 == 2
        there |= killed(results, target, chance, aside=aside, after_one=attempt % 2 == 1)
        held = target
        if not target.exists():
            # Between the two renames of the slow way the old folder waits beside, under a name that is looked for.
            waiting = list(here.glob(".out.old-*"))
            assert len(waiting) == 1 if there else not waiting
            if not waiting:
                continue
            assert aside
            held = waiting[0]
        there = True
        assert foreign(held) == ""
        loaded = sc.load(held, model=net, example=X)(X)
        assert any(torch.equal(loaded, output) for output in outputs)
        assert (here / "mine.txt").read_text() == "mine"
        assert (here / "out-of-mine").is_dir()
    results[0].save(target, force=True)
    assert sorted(path.name for path in here.iterdir()) == ["mine.txt", "out", "out-of-mine"]
    assert torch.equal(sc.load(target, model=net)(X), outputs[0])


def test_a_few_kills_lose_nothing(results, tmp_path):
    kill_many(results, tmp_path, 6)


@pytest.mark.slow
def test_forty_kills_lose_nothing(results, tmp_path):
    kill_many(results, tmp_path, 40)
