"""Winning tickets of LeNet-300-100 on MNIST digits: iterative magnitude pruning, rewound to the start, with controls.

    python benchmarks/lottery.py --data demo:mnist --out runs/lottery --jobs 5

Seeds are trained side by side, one process each. What is in the folder is not trained again, so a run that was stopped
goes on, and more seeds can be added later. Prints the table, the differences to the dense
network seed by seed, and whether the smallest ticket of at most a tenth of the weights reaches it while the same mask
with other weights does not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from secateur.comparison.significance import Paired, paired
from secateur.sources import resolve_data
from secateur.tickets import Tickets


def lenet_300_100(seed: int, device: str = "cpu") -> nn.Module:
    """Two hidden layers of 300 and 100, initialised by Glorot's normal rule as in the paper."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model.to(device)


def search(options: argparse.Namespace, seeds: list[int]) -> Tickets:
    """The dense networks, tickets and controls of some seeds, trained or read."""
    torch.set_num_threads(options.threads)
    return sc.lottery(
        partial(lenet_300_100, device=options.device),
        resolve_data(options.data, batch_size=60),
        folder=options.out,
        sparsity=options.sparsity,
        seeds=seeds,
        rate=options.rate,
        scope=options.scope,
        rewind={"step": int(options.rewind)} if options.rewind.isdigit() else options.rewind,
        controls=options.controls,
        control_rounds=options.control_rounds,
        training={"epochs": options.epochs, "optimizer": {"name": "adam", "lr": 1.2e-3}},
        name="lenet-300-100",
        progress=tell,
    )


def tell(what: str, done: int, total: int) -> None:
    """Names each network when it is trained."""
    if done == total:
        print(what, file=sys.stderr, flush=True)


def search_one(options: argparse.Namespace, seed: int) -> None:
    """One process: the networks stay in the folder."""
    search(options, [seed])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo:mnist", help="a DATA word, for example demo:mnist or npz:mnist.npz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--rate", type=float, default=0.2, help="share of the remaining weights masked per round")
    parser.add_argument("--scope", choices=("global", "local"), default="global")
    parser.add_argument("--rewind", default="init", help="init, rates, or the number of an early step")
    parser.add_argument("--controls", nargs="*", default=["reinit", "random"])
    parser.add_argument("--control-rounds", type=int, nargs="+", default=[9, 11, 13], help="rounds with controls")
    parser.add_argument("--device", default="cpu", help="so small a network is trained faster on one core of a CPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time")
    parser.add_argument("--rows", type=Path, help="train nothing: judge the rows of this file of JSON lines")
    options = parser.parse_args()
    if options.rows is not None:
        rows = [json.loads(line) for line in options.rows.read_text().splitlines() if line]
        found = Tickets(tuple(sorted(rows, key=lambda row: (row["seed"], row["round"]))), options.out, {})
        print(found.table())
        return verdict(found)
    if options.jobs > 1:
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
        with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
            list(pool.map(partial(search_one, options), options.seeds))
    found = search(options, options.seeds)
    lines = [json.dumps(dict(row)) for row in found.rows]
    (options.out / "rows.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{json.dumps(dict(found.config))}, torch {torch.__version__}\n\n{found.table()}")
    return verdict(found)


def verdict(found: Tickets) -> int:
    """Paired differences to the dense network, over the seeds; 0 where a ticket reaches it and its control does not."""
    dense = figures(found, "dense", 0)
    reached = False
    print("| weights left | ticket minus dense | reinit minus dense | ticket minus reinit |\n|---|---|---|---|")
    for number in sorted({row["round"] for row in found.rows if row["variant"] == "ticket"}):
        left = 1 - next(row["sparsity"] for row in found.rows if (row["variant"], row["round"]) == ("ticket", number))
        tickets, controls = figures(found, "ticket", number), figures(found, "reinit", number)
        ticket, reinit, between = paired(tickets, dense), paired(controls, dense), paired(tickets, controls)
        print(f"| {left:.2%} | {told(ticket)} | {told(reinit)} | {told(between)} |")
        reaches = ticket.mean + (ticket.half or 0) >= 0
        falls_short = reinit.pairs > 0 and reinit.mean + (reinit.half or 0) < 0
        reached |= left <= 0.1 and reaches and falls_short
    print(
        "\na ticket of at most 10 % of the weights is not below dense, and its reinit is:", "yes" if reached else "no"
    )
    return 0 if reached else 1


def figures(found: Tickets, variant: str, number: int) -> dict[int, float]:
    """Accuracy by seed."""
    rows = [row for row in found.rows if (row["variant"], row["round"]) == (variant, number)]
    return {row["seed"]: row["figures"]["accuracy"] for row in rows}


def told(difference: Paired) -> str:
    """Points, with the half-width of the 95 % interval where there is one; nothing where there are no pairs."""
    half = "" if difference.half is None else f" ± {100 * difference.half:.2f}"
    return f"{100 * difference.mean:+.2f}{half}" if difference.pairs else ""


if __name__ == "__main__":
    sys.exit(main())
