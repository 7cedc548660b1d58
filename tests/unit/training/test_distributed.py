"""Several processes that train one model end with the same masks; what is sharded is refused in words."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from secateur.errors import UnsupportedError
from secateur.training import MovementPruner, Pruner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def data(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    return [(torch.randn(8, 8, generator=generator), torch.arange(8) % 3) for _ in range(12)]


KINDS = {
    "magnitude": lambda model, moving, rank: Pruner(model, sparsity=0.8, end=8, optimizer=moving),
    # Every process scores its own data: without a mean over them the masks would differ.
    "taylor": lambda model, moving, rank: Pruner(
        model, sparsity=0.8, end=8, optimizer=moving, criterion="taylor", data=data(rank)
    ),
    "rigl": lambda model, moving, rank: Pruner(model, sparsity=0.8, end=8, every=2, optimizer=moving, regrow="rigl"),
    "set": lambda model, moving, rank: Pruner(model, sparsity=0.8, end=8, every=2, optimizer=moving, regrow="set"),
    "movement": lambda model, moving, rank: MovementPruner(model, sparsity=0.8, end=8, optimizer=moving),
}


def run(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    import warnings

    warnings.simplefilter("ignore")
    found = {}
    for kind, make in KINDS.items():
        model = nn.parallel.DistributedDataParallel(net())
        moving = torch.optim.AdamW(model.parameters(), lr=0.01)
        pruner = make(model, moving, rank)
        for x, y in data(rank):
            F.cross_entropy(model(x), y).backward()
            moving.step()
            moving.zero_grad()
            pruner.step()
        found[kind] = ({name: mask.clone() for name, mask in pruner.masks.items()}, model.module.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(net())
    found["cut"] = refusal(lambda: cut(wrapped))
    found["sharded"] = refusal(sharded)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def cut(wrapped):
    moving = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    Pruner(wrapped, torch.randn(2, 8), sparsity=0.5, granularity="channel", schedule="one_shot", optimizer=moving)


def sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
    Pruner(model, sparsity=0.5, schedule="one_shot")


def refusal(act):
    try:
        act()
    except UnsupportedError as error:
        return str(error)
    return ""


def test_two_processes_decide_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, args=(port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind in KINDS:
        (masks, weights), (others, theirs) = one[kind], two[kind]
        gone = sum(int((~mask).sum()) for mask in masks.values())
        assert gone == round(0.8 * sum(mask.numel() for mask in masks.values())), kind
        assert all(torch.equal(mask, others[name]) for name, mask in masks.items()), kind
        assert all(torch.equal(weight, theirs[name]) for name, weight in weights.items()), kind
    assert "DistributedDataParallel" in one["cut"]
    assert "sharded" in one["sharded"]
