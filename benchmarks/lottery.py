"""Winning tickets of LeNet-300-100 on MNIST digits: iterative magnitude pruning, rewound to the start, with controls.

    python benchmarks/lottery.py --data demo:mnist --out runs/lottery

What is in the folder is not trained again, so more seeds can be added later. Prints the table, and whether the smallest
ticket of at most a tenth of the weights reaches the dense network while the same mask with other weights does not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from secateur.comparison.significance import Paired, paired
from secateur.sources import resolve_data
from secateur.tickets import Tickets


def lenet_300_100(seed: int) -> nn.Module:
    """Two hidden layers of 300 and 100, initialised by Glorot's normal rule as in the paper."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a DATA word, for example demo:mnist or npz:mnist.npz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--rate", type=float, default=0.2, help="share of the remaining weights masked per round")
    parser.add_argument("--control-rounds", type=int, nargs="+", default=[11], help="rounds that have controls")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = resolve_data(options.data, batch_size=60)
    found = sc.lottery(
        lenet_300_100,
        data,
        folder=options.out,
        sparsity=options.sparsity,
        seeds=range(options.seeds),
        rate=options.rate,
        control_rounds=options.control_rounds,
        training={"epochs": options.epochs, "optimizer": {"name": "adam", "lr": 1.2e-3}},
        name="lenet-300-100",
        progress=lambda what, done, total: print(what, file=sys.stderr) if done == total else None,
    )
    print(found.table())
    return verdict(found)


def verdict(found: Tickets) -> int:
    """Paired differences to the dense network, over the seeds; 0 where a ticket reaches it and its control does not."""
    dense = figures(found, "dense", 0)
    reached = False
    for number in sorted({row["round"] for row in found.rows if row["variant"] == "reinit"}):
        density = 1 - found.row(seed=0, round=number)["sparsity"]
        ticket, reinit = (paired(figures(found, variant, number), dense) for variant in ("ticket", "reinit"))
        print(f"{density:6.1%} left: ticket {told(ticket)}, reinit {told(reinit)} against dense")
        reaches = ticket.mean + (ticket.half or 0) >= 0
        falls_short = reinit.mean + (reinit.half or 0) < 0
        reached |= density <= 0.1 and reaches and falls_short
    print("a winning ticket of at most 10 % of the weights:", "yes" if reached else "no")
    return 0 if reached else 1


def figures(found: Tickets, variant: str, number: int) -> dict[int, float]:
    rows = [row for row in found.rows if (row["variant"], row["round"]) == (variant, number)]
    return {row["seed"]: row["figures"]["accuracy"] for row in rows}


def told(difference: Paired) -> str:
    return f"{100 * difference.mean:+.2f} ± {100 * (difference.half or 0):.2f} points"


if __name__ == "__main__":
    sys.exit(main())
