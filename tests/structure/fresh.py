"""Cut and save here, rebuild and load in another process: the same outputs must come out."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur.errors import CertificateError, UnsupportedError
from secateur.files.safe import load_tensors, save_tensors
from secateur.loading import fill
from secateur.model.call import call, outputs

KINDS = ("channel", "head", "head_dim", "conv_group")
# Their weights are computed from weights, and would be others after the cut.
REFUSED = ("old_style_weight_and_spectral_norm", "spectral_normed", "weight_normed")
Build = Callable[[str, int], tuple[nn.Module, Any]]  # name and seed -> model, example


def forward(model: nn.Module, example: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        found = outputs(call(model, example))
    return {str(i): tensor for i, tensor in enumerate(found)}


def write(name: str, build: Build, folder: Path) -> bool:
    """Cut a model and save its plan, weights and outputs; False where nothing can be cut."""
    model, example = build(name, 0)
    for kind in KINDS:
        try:
            plan = sc.plan(model, example, granularity=kind, target={"sparsity": 0.3}, scope="local")
            cut = plan.apply(model).eval()
        except CertificateError:
            if name in REFUSED:
                return False
            raise
        except UnsupportedError:
            continue
        folder.mkdir()
        plan.save(folder / "plan.json")
        save_tensors(folder / "weights.safetensors", dict(cut.state_dict(keep_vars=True)))
        save_tensors(folder / "outputs.safetensors", forward(cut, example))
        return True
    return False


def reload(name: str, build: Build, folder: Path) -> None:
    """Run in the other process: rebuild with other weights, replay the plan, fill, compare."""
    model, example = build(name, 1)
    sc.Plan.load(folder / "plan.json").apply(model, inplace=True)
    fill(model, load_tensors(folder / "weights.safetensors"))
    wanted = load_tensors(folder / "outputs.safetensors")
    for key, found in forward(model.eval(), example).items():
        torch.testing.assert_close(found, wanted[key], atol=1e-5, rtol=1e-4, equal_nan=True)


def load_all_elsewhere(names: Iterable[str], build: Build, folder: Path, script: str) -> int:
    """Write every model, then let `script` reload them all in one fresh process; how many were loaded."""
    places = {name: folder / str(i) for i, name in enumerate(names)}
    done = {name: place for name, place in places.items() if write(name, build, place)}
    pairs = [f"{name}={place}" for name, place in done.items()]
    command = [sys.executable, script, *pairs]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(script).parent)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == f"{len(done)} loaded"
    return len(done)


def main(build: Build) -> None:
    """The other process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for pair in sys.argv[1:]:
        name, _, folder = pair.rpartition("=")
        try:
            reload(name, build, Path(folder))
        except Exception as error:
            sys.exit(f"{name}: {type(error).__name__}: {error}")
    print(f"{len(sys.argv) - 1} loaded")
