"""Several processes with a share of the batches each: one plan, that of a single process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import secateur as sc
from secateur.errors import RecipeError

transformers = pytest.importorskip("transformers")

ASKED = {
    "criterion": {"name": "admm", "steps": 6, "choosing": 4}, "granularity": "element", "scope": "row",
    "target": {"sparsity": 0.5},
}  # fmt: skip
WORK = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_together import model_and_batches, planned
dist.init_process_group("gloo")
calls = []
model, batches = model_and_batches()
model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
plan = planned(model, batches, {"together": True})
torch.save((plan.weights, plan.masks, len(calls)), f"{sys.argv[2]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def model_and_batches():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    batches = torch.randint(0, 64, (9, 2, 24), generator=torch.Generator().manual_seed(1))
    return transformers.LlamaForCausalLM(config).double().eval(), [{"input_ids": one} for one in batches]


def planned(model, batches, blocks=None):
    return sc.plan(model, {"input_ids": batches[0]["input_ids"][:1, :8]}, data=batches, blocks=blocks, **ASKED)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_end_with_the_plan_of_one_and_share_the_passes(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *words, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    calls = []
    model, batches = model_and_batches()
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    alone = planned(model, batches)
    for name, wanted in alone.weights.items():
        assert torch.equal(one[0][name], two[0][name])
        assert torch.equal(one[1][name], two[1][name])
        torch.testing.assert_close(one[0][name], wanted, rtol=1e-8, atol=1e-10)
    # Of nine batches one process takes five, and the other four; some runs on the example are everybody's.
    assert len(calls) - max(one[2], two[2]) >= 4


def test_without_a_group_it_is_refused():
    model, batches = model_and_batches()
    with pytest.raises(RecipeError, match="needs a group of processes"):
        planned(model, batches, {"together": True})
