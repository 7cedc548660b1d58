"""Every micro-model, saved after its cut, gives the same outputs when another process rebuilds and loads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import enliven
from micro import CASES
from torch import nn

import secateur as sc
from secateur.call import call, outputs
from secateur.errors import UnsupportedError
from secateur.files.safe import load_tensors, save_tensors
from secateur.loading import fill

HERE = Path(__file__).parent
KINDS = ("channel", "head", "head_dim", "conv_group")


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return enliven(CASES[name].build()).eval()


def forward(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        found = outputs(call(model, CASES[name].example()))
    return {str(i): tensor for i, tensor in enumerate(found)}


def write(name: str, folder: Path) -> bool:
    """Cut a model and save its plan, weights and outputs; False where nothing can be cut."""
    model = build(name, 0)
    for kind in KINDS:
        try:
            plan = sc.plan(model, CASES[name].example(), granularity=kind, target={"sparsity": 0.3}, scope="local")
        except UnsupportedError:
            continue
        cut = plan.apply(model)
        folder.mkdir()
        plan.save(folder / "plan.json")
        save_tensors(folder / "weights.safetensors", dict(cut.state_dict(keep_vars=True)))
        save_tensors(folder / "outputs.safetensors", forward(name, cut))
        return True
    return False


def reload(folder: Path) -> None:
    """Run in the other process: rebuild with other weights, replay the plan, fill, compare."""
    model = build(folder.name, 1)
    sc.Plan.load(folder / "plan.json").apply(model, inplace=True)
    fill(model, load_tensors(folder / "weights.safetensors"))
    wanted = load_tensors(folder / "outputs.safetensors")
    for key, found in forward(folder.name, model).items():
        torch.testing.assert_close(found, wanted[key], atol=1e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_all_micro_models_load_in_a_fresh_process(tmp_path: Path) -> None:
    done = [name for name in sorted(CASES) if write(name, tmp_path / name)]
    assert len(done) > 0.9 * len(CASES)
    script = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, timeout=280, check=False, cwd=HERE)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == f"{len(done)} loaded"


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = sorted(Path(sys.argv[1]).iterdir())
    for one in folders:
        try:
            reload(one)
        except Exception as error:
            sys.exit(f"{one.name}: {type(error).__name__}: {error}")
    print(f"{len(folders)} loaded")
