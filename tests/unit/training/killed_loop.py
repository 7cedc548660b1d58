"""A loop that saves after every step and goes on from what is there; run by test_killed.py, and killed by it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pattern_problem import Net, patterns
from torch.nn import functional as F

from secateur.files import save_tensors
from secateur.files.states import load_state, save_state
from secateur.training import MovementPruner, Pruner

STEPS = 16


def start(kind, x):
    torch.manual_seed(7)
    model = Net()
    moving = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    if kind == "movement":
        return model, moving, MovementPruner(model, sparsity=0.8, begin=2, end=12, optimizer=moving)
    granularity = "channel" if kind == "channel" else "element"
    return model, moving, Pruner(
        model, x[:2], sparsity=0.6, begin=2, end=12, every=5, optimizer=moving, granularity=granularity,
        regrow="rigl" if kind == "rigl" else None,
    )  # fmt: skip


def main(kind, folder, tell):
    torch.set_num_threads(1)
    x, y = patterns(64, 1)
    model, moving, pruner = start(kind, x)
    saved, done = folder / "state.safetensors", 0
    if saved.exists():
        state = load_state(saved)
        done = state["done"]
        pruner.load_state_dict(state["pruner"])
        model.load_state_dict(state["model"])
        moving.load_state_dict(state["optimizer"])
    for step in range(done, STEPS):
        rows = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        moving.step()
        moving.zero_grad()
        pruner.step()
        parts = {"pruner": pruner.state_dict(), "model": model.state_dict(), "optimizer": moving.state_dict()}
        save_state(saved, {"done": step + 1, **parts})
        tell(step + 1)
    pruner.finish()
    save_tensors(folder / "model.safetensors", model.state_dict())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), print)
