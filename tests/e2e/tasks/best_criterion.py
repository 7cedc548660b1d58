"""Task: "which criterion is best on my data". Written from docs/how-to/compare-criteria.md alone."""

import csv
import json
from pathlib import Path

import numpy as np

from secateur.cli.main import main

# What the user has: a network in a file, weights, and an npz.
Path("mynet.py").write_text("""
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.AdaptiveMaxPool2d((1, 6)), nn.Flatten(), nn.Linear(144, 5),
    )


def build():
    model = net()
    model.load_state_dict(load_file(Path(__file__).parent / "weights.safetensors"))
    return model
""")
draw = np.random.default_rng(0)
y = np.arange(400) % 5
x = draw.integers(0, 120, (400, 1, 12, 12), dtype=np.uint8)
x[np.arange(400), 0, :, 2 * y] += 100
np.savez("mine.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])


def train() -> None:
    import sys

    sys.path.insert(0, ".")
    from mynet import net
    from safetensors.torch import save_file

    from secateur.recover import finetune
    from secateur.sources import resolve_data

    model = net()
    finetune(model, resolve_data("npz:mine.npz").train, optimizer={"name": "adam", "lr": 0.005}, epochs=8)
    save_file(model.state_dict(), "weights.safetensors")


train()

# what a user types
command = "compare mynet.py:build --data npz:mine.npz --criteria l1,fpgm,taylor --levels 0.5,0.7 --seeds 2"
assert main([*command.split(), "--out", "runs/compare"]) == 0

rows = list(csv.DictReader(Path("runs/compare/results.csv").read_text().splitlines()))
summary = json.loads(Path("runs/compare/summary.json").read_text())
means = {row["criterion"]: row["mean"] for row in summary["curve_means"]["none"]}
assert {"magnitude norm=l1", "fpgm", "taylor", "magnitude", "random"} == set(means)  # the last two always run with it
assert {row["criterion"] for row in rows} >= set(means)
assert Path("runs/compare/compare.html").stat().st_size > 10_000
best = max(means, key=lambda name: means[name])
assert means[best] >= means["random"]
print("best on my data:", best)
