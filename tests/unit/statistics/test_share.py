"""Several processes with a share of the data each: scores, statistics and masks are those of one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import secateur as sc
from secateur.criteria.base import CRITERIA
from secateur.errors import RecipeError
from secateur.model.share import Share, shared
from secateur.statistics.activations.readings import readings

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


class Net(nn.Module):
    """Convolution, norm, a branch that only some batches take, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 6, 3, groups=2)
        self.hidden, self.out = nn.Linear(6 * 16, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.out(torch.relu(self.hidden(torch.relu(self.next(x)).flatten(1))))


def example() -> torch.Tensor:
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(9))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Seven of unequal size: no two processes get the same number of samples."""
    generator = torch.Generator().manual_seed(1)
    sizes = (5, 3, 6, 2, 7, 3, 4)
    return [(torch.randn(n, 2, 6, 6, generator=generator), torch.arange(n) % 3) for n in sizes]


# Every criterion that says so, as it comes, and what of its options goes another way.
OPTIONS: dict[str, list[dict[str, object]]] = {
    "apoz": [{}, {"epsilon": 0.01}],
    "taylor": [{}, *({"reduce": how} for how in ("abs", "squared", "per-batch", "per-sample"))],
    "head-importance": [{}, {"reduce": "per-batch"}],
    "fisher": [{}, {"joint": True}],
    "kfac": [{}, {"form": "ekfac"}, {"form": "obs", "damping": 1e-3}, {"slopes": "data"}],
    "thinet": [{}, {"positions": 3}],
}
CASES = [
    (name, options, granularity)
    for name in CRITERIA.names()
    if CRITERIA.find(name).shares
    for options in OPTIONS.get(name, [{}])
    for granularity in ("channel", "element")
    if granularity in CRITERIA.find(name).granularities or CRITERIA.find(name).granularities == ("any",)
    or (granularity == "channel" and "channel" in CRITERIA.find(name).granularities)
]  # fmt: skip


def found(data: object) -> dict[str, object]:
    """Scores of every case, the masks of a target, and Gram matrices."""
    told: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options, unit in CASES:
            criterion = {"name": name, **options}
            given = {"criterion": criterion, "granularity": unit, "data": data}
            told[f"{name} {options} {unit}"] = dict(sc.score(Net().eval(), example(), **given))
        for unit in ("channel", "element"):
            plan = sc.plan(
                Net().eval(), example(), criterion="taylor", granularity=unit, data=data, target={"sparsity": 0.4}
            )
            told[f"kept {unit}"] = plan.masks or dict(plan.evidence.keep)
    groups = sc.inspect(Net(), example()).groups
    for group, consumers in readings(Net().eval(), data, groups, positions=3):
        told[f"gram {group.name}"] = {one.weight: one.gram for one in consumers}
    return told


WORK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo")
import test_share
{work}
dist.destroy_process_group()
"""


def torchrun(folder: Path, work: str, *, processes: int = 2, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    script = folder / "work.py"
    script.write_text(WORK.format(work=work))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words, str(Path(__file__).parent), str(folder)],
        capture_output=True, text=True, check=False, env=env, timeout=timeout,
    )  # fmt: skip


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("processes", [2, 3])
def test_scores_statistics_and_masks_are_those_of_one_process(tmp_path: Path, processes: int) -> None:
    work = (
        'torch.save(test_share.found(test_share.shared(test_share.batches())), f"{sys.argv[2]}/{dist.get_rank()}.pt")'
    )
    done = torchrun(tmp_path, work, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = found(batches())
    for rank in range(processes):
        told = torch.load(tmp_path / f"{rank}.pt")
        assert told.keys() == alone.keys()
        for what, tensors in alone.items():
            for name, wanted in tensors.items():
                if what.startswith("kept"):
                    assert torch.equal(told[what][name], wanted), (rank, what, name)
                    continue
                largest = float(wanted.abs().max())
                worst = float((told[what][name] - wanted).abs().max())
                assert worst <= 2e-5 * largest, (rank, what, name, worst / largest)


class Alone(Share):
    """The share of one of two processes, of which there is only this one: what it gathers is no whole."""

    def __init__(self, data: object, rank: int) -> None:
        from secateur.processes import Processes

        super().__init__(data, Processes(rank, 2, torch.device("cpu")))


def test_shares_are_disjoint_and_complete() -> None:
    whole = batches()
    parts = [list(Alone(whole, rank)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [4, 3]
    joined = {id(batch) for part in parts for batch in part}
    assert joined == {id(batch) for batch in whole}


def test_without_a_group_it_is_refused() -> None:
    with pytest.raises(RecipeError, match="no group of processes"):
        shared(batches())


FAILURES = {
    "other data": ("data = test_share.batches()[dist.get_rank():]", "read different data"),
    "other order": ("data = test_share.batches()[::1 - 2 * dist.get_rank()]", "read different data"),
    "too few": ("data = test_share.batches()[:1]", "1 batches for 2 processes"),
    "other model": (
        "data = test_share.batches(); net.out.weight.data.add_(dist.get_rank())", "has another model"
    ),
    "one fails": (
        "data = test_share.batches(); data[1] = (data[1][0] * float('nan'), data[1][1])",
        "process 1 of 2 failed, so this one ends as well",
    ),
    "criterion": ("data = test_share.batches(); how = 'obd'", "cannot share its data"),
}  # fmt: skip


@pytest.mark.slow
@needs_gloo
def test_what_cannot_be_shared_ends_all_processes_with_one_clear_error(tmp_path: Path) -> None:
    work = """
import secateur as sc
from secateur.errors import SecateurError
for name, (made, words) in test_share.FAILURES.items():
    net, how = test_share.Net().eval(), "taylor"
    exec(made)
    try:
        sc.plan(net, test_share.example(), criterion=how, data=test_share.shared(data), target={"sparsity": 0.4})
        said = "nothing"
    except SecateurError as error:
        said = str(error)
    with open(f"{sys.argv[2]}/{dist.get_rank()}.txt", "a") as file:
        file.write(f"{name}: {said!r}" + chr(10))
"""
    done = torchrun(tmp_path, work)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    for number, (name, (_, words)) in enumerate(FAILURES.items()):
        for rank in (0, 1):
            wanted = "nan" if name == "one fails" and rank == 1 else words
            assert told[rank][number].startswith(f"{name}: "), told[rank]
            assert wanted in told[rank][number], (rank, told[rank][number])


@pytest.mark.slow
@needs_gloo
def test_a_process_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = WORK.format(
        work="""
import time, secateur as sc
class Slow(list):
    def __iter__(self):
        for number, batch in enumerate(list.__iter__(self)):
            open(f"{sys.argv[2]}/begun{dist.get_rank()}", "w").close()
            time.sleep(0.3 * dist.get_rank() * number)
            yield batch
data = test_share.shared(Slow(test_share.batches()))
sc.plan(test_share.Net().eval(), test_share.example(), criterion="taylor", data=data, target={"sparsity": 0.4})
"""
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)],
            stderr=subprocess.PIPE, text=True, env={**env, "RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for _ in range(600):
            if (tmp_path / "begun1").exists():
                break
            time.sleep(0.1)
        time.sleep(0.3)
        pair[1].send_signal(signal.SIGKILL)
        told = pair[0].communicate(timeout=60)[1]
    finally:
        for one in pair:
            one.kill()
            one.communicate()
    assert pair[0].returncode == 1
    assert "the other processes cannot be reached any more" in told
