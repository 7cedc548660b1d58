"""A run of prune whose solver is interrupted or killed goes on behind the last finished block, to the same bytes."""

import os
import random
import signal
import warnings

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FileRefusedError
from secateur.files import disk
from secateur.model.hashing import hash_model

DEPTH = 4
PER_BLOCK = 2
QUICK = {"measure": {"rounds": 1, "warmup": 0, "latency": False}}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(8, 20)

    def forward(self, ids):
        hidden = self.table(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Stop(Exception):
    pass


def net():
    torch.manual_seed(2)
    return Net().eval()


def batches():
    g = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, 20, (2, 16), generator=g)} for _ in range(5)]


def ending(after, end):
    """Progress that notes what is solved, and ends the run when it hears of a matrix number `after`."""
    solved = []

    def progress(stage, done, total):
        if stage == "solve":
            solved.append(done)
            if after is not None and done >= after:
                end()

    return solved, progress


def stop():
    raise Stop


def prune(folder=None, after=None, end=stop, own=None, criterion="admm", targets="dense"):
    recipe = {
        "criterion": criterion, "granularity": "element", "scope": "row", "target": {"sparsity": 0.5},
        "blocks": {"targets": targets, "use": True, **({} if own is None else {"checkpoint": str(own)})}, **QUICK,
    }  # fmt: skip
    solved, progress = ending(after, end)
    kept = {} if folder is None else {"checkpoint": folder}
    example = {"ids": batches()[0]["ids"][:1]}
    return sc.prune(net(), example, data=batches(), recipe=recipe, progress=progress, **kept), solved


def facts(result):
    return hash_model(result.model), result.plan.to_json()


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    """Kills are what is tested, and no loss of power: nothing waits for the disk."""
    monkeypatch.setattr(disk, "fsync", lambda fd: None)
    monkeypatch.setattr(disk, "sync_path", lambda path: None)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("criterion", "targets"), [("admm", "dense"), ("sparsegpt", "own"), ("wanda", "auto")])
def test_an_interrupted_run_solves_no_finished_block_again(criterion, targets, tmp_path):
    whole, calls = prune(criterion=criterion, targets=targets)
    folder = tmp_path / "c"
    with pytest.raises(Stop):
        prune(folder, after=2 * PER_BLOCK + 1, criterion=criterion, targets=targets)
    solved, progress = ending(None, stop)
    again = sc.resume(folder, net(), {"ids": batches()[0]["ids"][:1]}, data=batches(), progress=progress)
    assert facts(again) == facts(whole)
    # One call for each block that is taken back, and one for each matrix that is solved.
    assert len(calls) - len(solved) == 2 * (PER_BLOCK - 1)
    again.save(tmp_path / "out")
    assert not folder.exists()


def test_killed_with_signal_9_at_random_matrices_it_ends_with_the_same_bytes(tmp_path):
    whole, _ = prune()
    chance, folder, at = random.Random(6), tmp_path / "c", 0
    for _ in range(3):
        # Farther each time, or what is done twice could stand for what is taken up.
        at = min(at + chance.randrange(1, 4), DEPTH * PER_BLOCK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that a fork does not take along: all of them have ended
            pid = os.fork()
        if pid == 0:
            try:
                prune(folder, after=at, end=lambda: os.kill(os.getpid(), signal.SIGKILL))
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    again, solved = prune(folder)
    assert facts(again) == facts(whole)
    assert len(solved) < DEPTH * PER_BLOCK


def test_a_folder_that_the_recipe_names_is_used_and_stays(tmp_path):
    """It is the user's, and serves the next run of the same kind."""
    own = tmp_path / "mine"
    result, _ = prune(tmp_path / "c", own=own)
    result.save(tmp_path / "out")
    assert not (tmp_path / "c").exists()
    assert (own / "0" / "state.json").exists()


def test_a_damaged_block_is_refused(tmp_path):
    with pytest.raises(Stop):
        prune(tmp_path / "c", after=2 * PER_BLOCK + 1)
    (file,) = (tmp_path / "c").rglob("block-1.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileRefusedError):
        prune(tmp_path / "c")
