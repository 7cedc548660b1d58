"""How long planning and cutting take, beside Torch-Pruning in the same run.

    python benchmarks/structure.py [--rounds 5] [--models resnet50 vit] [--threads 1]

Models are built from transformers configurations with random weights (ResNet-50, ViT-B/16). One round times
secateur (capture, groups, scores, plan, cut; then verification apart) and Torch-Pruning (graph, importance, step) on
fresh copies of the same model, in alternating order. Printed are medians, their ratio, and the time of a forward pass.
Needs: pip install secateur[hf] torch-pruning==1.6.1
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import secateur as sc


class Logits(nn.Module):
    """The plain tensor-to-tensor form that Torch-Pruning needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def build(name: str) -> nn.Module:
    """A network with random weights."""
    import transformers

    if name == "resnet50":
        return Logits(transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))).eval()
    return Logits(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))).eval()


def ours(model: nn.Module, x: torch.Tensor, target: dict[str, float]) -> dict[str, float]:
    """Seconds of secateur, in place as Torch-Pruning works; verification apart."""
    original = copy.deepcopy(model)
    started = time.perf_counter()
    plan = sc.plan(model, x, target=target)
    certify = plan.evidence.certify
    plan.evidence = None  # the cut alone
    plan.apply(model, inplace=True)
    middle = time.perf_counter()
    certificate = certify(original, model)
    ended = time.perf_counter()
    assert certificate.max_abs_error < 1e-2
    return {"secateur": middle - started, "secateur verification": ended - middle}


def theirs(model: nn.Module, x: torch.Tensor, ratio: float) -> dict[str, float]:
    """Seconds of Torch-Pruning, and whether the forward of its result runs."""
    import torch_pruning as tp

    started = time.perf_counter()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=True,
        ignored_layers=[last],
    )
    pruner.step()
    seconds = time.perf_counter() - started
    try:
        with torch.no_grad():
            model(x)
        runs = 1.0
    except Exception:
        runs = 0.0
    return {"Torch-Pruning": seconds, "Torch-Pruning forward runs": runs}


def forward(model: nn.Module, x: torch.Tensor) -> float:
    """Median seconds of a forward pass."""
    times = []
    with torch.no_grad():
        for _ in range(5):
            started = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Time every model and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(1, 3, 224, 224)
    for name in args.models:
        model = build(name)
        seconds: dict[str, list[float]] = {}
        for number in range(args.rounds + 1):  # the first round warms up and is not counted
            for tool in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                timed = (
                    ours(copy.deepcopy(model), x, {"sparsity": 0.3})
                    if tool == "ours"
                    else theirs(copy.deepcopy(model), x, 0.3)
                )
                for key, value in timed.items():
                    seconds.setdefault(key, []).append(value)
        medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
        print(f"{name}: forward pass {forward(model, x):.3f} s, {args.threads} thread(s), {args.rounds} rounds")
        for key, value in medians.items():
            print(f"  {key}: {value:.3f}")
        print(f"  ratio to Torch-Pruning: {medians['secateur'] / medians['Torch-Pruning']:.2f}")


if __name__ == "__main__":
    main()
