"""A model whose parameters are sharded over processes: scores and masks are those of the whole model in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import secateur as sc

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 17), nn.LayerNorm(17), nn.ReLU(), nn.Linear(17, 9), nn.ReLU(), nn.Linear(9, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.arange(n) % 3) for n in (5, 3, 6, 2, 7)]


CASES: dict[str, dict[str, object]] = {
    "magnitude": {"criterion": "magnitude"},
    "snip": {"criterion": "snip"},
    "gradient": {"criterion": "gradient"},
    "taylor": {"criterion": {"name": "taylor", "reduce": "abs"}},
    "partly sharded": {"criterion": "snip"},
    "rows": {
        "criterion": {"name": "taylor", "reduce": "signed"}, "granularity": {"name": "vector", "axis": "row"},
    },
}  # fmt: skip
CUT = {"criterion": {"name": "taylor", "reduce": "squared"}, "granularity": "channel", "target": {"sparsity": 0.3}}

WORK = """
import sys, warnings, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_sharded_plan import CASES, CUT, batches, net
from secateur.errors import SecateurError
from secateur.sharded import mask_shards, plan_sharded
mesh, found = init_device_mesh("cpu", (2,)), {}

def sharded(partly=False):
    model = net().train()
    fully_shard(model[0], mesh=mesh)
    return model if partly else fully_shard(model, mesh=mesh)

def full(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()

def whole():
    with torch.device("meta"):
        return net()

def refusal(act):
    try:
        act()
    except SecateurError as error:
        return str(error)
    return ""

for name, asked in CASES.items():
    model, plain = sharded(name.startswith("partly")), whole()
    given = {"granularity": "element", "target": {"sparsity": 0.4}, **asked}
    plan = plan_sharded(model, plain, data=batches(), **given)
    assert model.training and all(p.grad is None for p in model.parameters())
    mask_shards(model, plan)
    found[name] = (
        {} if plan is None else dict(plan.masks), {} if plan is None else dict(plan.evidence.scores),
        {n: full(p) for n, p in model.named_parameters()},
    )
model, plain = sharded(), whole()
plan = plan_sharded(model, plain, torch.randn(2, 6), data=batches(), **CUT)
found["cut"] = {} if plan is None else {n: t.detach() for n, t in plan.apply(plain).named_parameters()}
found["cut shards"] = refusal(lambda: mask_shards(model, plan))
found["whole"] = refusal(lambda: plan_sharded(net(), whole(), target={"sparsity": 0.4}))
found["other"] = refusal(lambda: plan_sharded(sharded(), torch.nn.Linear(2, 2), target={"sparsity": 0.4}))
found["no data"] = refusal(lambda: plan_sharded(sharded(), whole(), criterion="snip", target={"sparsity": 0.4}))
found["more"] = refusal(
    lambda: plan_sharded(sharded(), whole(), data=batches(), criterion="fisher", target={"sparsity": 0.4})
)
torch.save(found, f"{sys.argv[2]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def test_scores_and_masks_of_shards_are_those_of_the_whole(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *words, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, asked in CASES.items():
        plan = sc.plan(
            net().eval(), **{"granularity": "element", "data": batches(), "target": {"sparsity": 0.4}, **asked}
        )
        masks, scores, weights = one[name]
        assert masks.keys() == plan.masks.keys()
        assert plan.evidence is not None
        for tensor, mask in plan.masks.items():
            assert torch.equal(masks[tensor], mask), (name, tensor)
            worst = float((scores[tensor] - plan.evidence.scores[tensor]).abs().max())
            assert worst <= 1e-5 * float(plan.evidence.scores[tensor].abs().max()), (name, tensor)
            # Every shard has its zeros, and nothing else has moved.
            assert torch.equal(weights[tensor], net().get_parameter(tensor) * mask)
            assert not weights[tensor][~mask].signbit().any()  # zeros, and no -0.0
            assert torch.equal(two[name][2][tensor], weights[tensor])
    smaller = sc.plan(net().eval(), torch.randn(2, 6), data=batches(), **CUT).apply(net())
    for name, weight in smaller.named_parameters():
        assert torch.equal(one["cut"][name], weight), name
    assert "cannot be cut where it lies" in one["cut shards"]
    assert "process 0 of 2 failed" in two["cut shards"]
    for rank in (one, two):
        assert "is sharded" in rank["whole"]
        assert "another one" in rank["other"]
        assert "needs data" in rank["no data"]
    assert "only the mean gradient is known" in one["more"]
    assert "process 0 of 2 failed" in two["more"]
