"""Models whose weights lie in pieces on several processes are refused in words, by every door, before anything runs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import secateur as sc
from secateur.errors import UnsupportedError

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def mesh():
    """One process is enough: FSDP2 makes the same tensors of its weights as with many."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def whole(mesh):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net(), mesh=mesh)


def one_layer(mesh):
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model[2], mesh=mesh)
    return model


def one_weight(mesh):
    """As tensor parallelism leaves a model: plain modules, and one weight in pieces."""
    from torch.distributed.tensor import Shard, distribute_tensor

    model = net()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    return model


# To import FSDP takes seconds; a weight in pieces, which is what it makes, does not.
MODELS = [
    pytest.param(whole, "Sequential", marks=pytest.mark.slow),
    pytest.param(one_layer, "2", marks=pytest.mark.slow),
    (one_weight, "0.weight"),
]
X = torch.zeros(2, 8)
DOORS = {
    "Pruner": lambda model: sc.Pruner(model, sparsity=0.5, schedule="one_shot"),
    "MovementPruner": lambda model: sc.MovementPruner(
        model, sparsity=0.5, end=3, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    ),
    "mask_model": lambda model: sc.mask_model(model, {"0.weight": torch.zeros(16, 8).bool()}),
    "plan of masks": lambda model: sc.plan(model, granularity="element", target={"sparsity": 0.5}),
    "plan of cuts": lambda model: sc.plan(model, X, target={"params": 0.5}),
    "score": lambda model: sc.score(model, criterion="magnitude", granularity="element"),
    "prune": lambda model: sc.prune(model, X, target={"params": 0.5}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("make", "where"), MODELS)
def test_what_is_sharded_is_refused_in_words(make, where, door, mesh):
    with pytest.raises(UnsupportedError) as refused:
        DOORS[door](make(mesh))
    words = str(refused.value)
    assert "sharded over processes" in words
    assert f"{where}'" in words
    assert "gather" in words
