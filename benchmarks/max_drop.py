"""Does "at most this loss" keep its promise, and what does it cost beside a grid?

    python benchmarks/max_drop.py --out runs/max_drop.json [--seeds 10] [--max-drop 1.0] [--epochs 1]
        [--grid-seeds 10] [--halves] [--confidence 0.95]
    python benchmarks/max_drop.py --network resnet20 --data PATH_TO_CIFAR10 --cache runs/trained --out FILE ...
    python benchmarks/max_drop.py --network minilm --data PATH_TO_SST2 --cache runs/trained --out FILE ...

The demo network: for each seed one is trained on 4,000 MNIST digits, and pruned as `secateur prune --max-drop` does:
800 of them choose the amount, which the recoveries of all amounts do not see. The 1,000 test digits are read once, at
the end: the promise holds where the pruned network loses at most so much there. With `--halves` one half of the test
digits chooses and the other one confirms: 500 are too few for bounds that count six looks, and mostly nothing is
promised.
`resnet20` and `minilm` are trained once (see trained.py); what they have not seen is divided anew by every seed, one
half chooses, and the other half is read once. An amount is recovered by 60 steps of 128 images, or of 32 sentences.
Beside it, in the same process and in turns by seed: a plain grid of ten amounts with the same recovery, samples and
bounds, of which the smallest is taken that keeps the limit. Time is that of the processor.

Rows that lie in the file are not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import TypedDict

import torch
from torch import nn

import secateur as sc
from compare_cifar10 import TRAIN
from secateur.asking import Asked
from secateur.errors import TargetError
from secateur.files.atomic import atomic_write
from secateur.measure import accuracy
from secateur.model.door import enter
from secateur.objective.evaluate import Objective, with_target
from secateur.objective.limits import FIGURES_ALONE, AtMost
from secateur.recipe import Recipe, load_recipe
from secateur.sources import TensorData, resolve_data
from secateur.sources.demo import build_convnet, train_demo
from secateur.types import Data
from trained import NETWORKS

GRID = tuple(round(1 - step / 11, 4) for step in range(1, 11))  # of the multiply-accumulates that are left


RECIPES: dict[str, dict[str, object]] = {
    "resnet20": {
        "criterion": "taylor",
        "granularity": "channel",
        "target": {"macs": 0.5},
        # A quarter of the usual rate: the network was trained down to none, and one that is begun anew loses most of a
        # point by itself.
        "recover": [TRAIN[0], {**TRAIN[1], "optimizer": {**TRAIN[1]["optimizer"], "lr": 0.005}}],
    },
    "minilm": {
        "criterion": "taylor",
        "granularity": ["head", "neuron"],
        "target": {"macs": 0.5},
        "recover": [
            {"method": "finetune", "steps": 60, "optimizer": {"name": "adamw", "lr": 3e-5}, "schedule": "linear"}
        ],
    },
}
Given = tuple[nn.Module, dict[str, Data], Recipe]


class MaxDropRow(TypedDict):
    """What one seed gave; None where nothing was sure to keep the limit."""

    seed: int
    accuracy: float
    macs: float | None
    drop: float | None
    verdict: str
    seconds: float
    attempts: int
    grid_macs: float | None
    grid_seconds: float | None


def demo(seed: int, asked: argparse.Namespace) -> Given:
    """A network of its own for each seed."""
    digits = resolve_data("demo:mnist", seed=seed)
    assert isinstance(digits.test, TensorData)
    net = build_convnet(seed)
    train_demo(net, digits.train, seed=seed)
    set_to = [f"recover.1.epochs={asked.epochs}", "measure.latency=false", f"seed={seed}"]
    data: dict[str, Data] = {"train": digits.train, "calibration": digits.calibration, "test": digits.test}
    if asked.halves:
        choice, held_out = digits.test.divided(0.5)  # each class in the same proportion
        data |= {"calibration": choice, "test": held_out}
    return net, data, load_recipe("channel-half-macs", set_to)


def trained(seed: int, asked: argparse.Namespace) -> Given:
    """One network for all seeds."""
    found = NETWORKS[asked.network](asked.data, asked.cache, seed)
    recipe = load_recipe({**RECIPES[asked.network], "measure": {"latency": False}, "seed": seed})
    return found.net, found.parts(seed), recipe


def one_seed(seed: int, asked: argparse.Namespace) -> MaxDropRow:
    """Find the amount both ways, or one."""
    net, data, recipe = demo(seed, asked) if asked.network == "demo" else trained(seed, asked)
    grid, max_drop = seed < asked.grid_seeds, asked.max_drop
    macs = drop = None
    attempts, verdict, started = 0, "none", time.process_time()
    try:
        result = sc.prune(net, data=data, recipe=recipe, max_drop=max_drop, confidence=asked.confidence)
        limit = result.report.limit
        assert limit is not None
        assert limit.test is not None
        macs, drop, attempts, verdict = (
            result.report.achieved["macs"],
            limit.test.drop,
            len(limit.attempts),
            limit.verdict,
        )
    except TargetError as error:
        print(f"seed {seed}: {error}", flush=True)
    seconds, started = time.process_time() - started, time.process_time()
    smallest = by_grid(net, data, recipe, AtMost(max_drop, confidence=asked.confidence)) if grid else None
    spent = time.process_time() - started if grid else None
    return {
        "seed": seed, "accuracy": accuracy(net, data["test"]), "macs": macs, "drop": drop, "verdict": verdict,
        "seconds": seconds, "attempts": attempts, "grid_macs": smallest, "grid_seconds": spent,
    }  # fmt: skip


def by_grid(net: nn.Module, data: dict[str, Data], recipe: Recipe, wanted: AtMost) -> float | None:
    """The smallest of ten amounts whose bound keeps the limit."""
    given = enter(data)
    asked = Asked(net, given.example(), (), given, recipe, None, {}, None, None, None, "", "")
    each = 1 - (1 - wanted.confidence) / len(GRID) if wanted.confidence > FIGURES_ALONE else wanted.confidence
    objective, kept = Objective(asked, confidence=each), []
    for amount in GRID:
        try:
            found = objective.evaluate(with_target(recipe, {"macs": amount}))
        except TargetError:
            continue
        if found.fall.high is not None and found.fall.high <= wanted.max_drop:
            kept.append(found.shares["macs"])
    return min(kept, default=None)


def table(rows: list[MaxDropRow], max_drop: float) -> str:
    """What all seeds gave, in words."""
    held = [row for row in rows if row["drop"] is not None and row["drop"] <= max_drop]
    found = [row for row in rows if row["drop"] is not None]
    lines = ["seed  dense   MACs left  grid   lost (held out)  verdict  s      grid s"]
    for row in rows:
        figures = [f"{row[name]:.3f}" if row[name] is not None else "none" for name in ("macs", "grid_macs")]
        lost = "-" if row["drop"] is None else f"{row['drop']:.2f}"
        lines.append(
            f"{row['seed']:<5} {row['accuracy']:.3f}   {figures[0]:<9}  {figures[1]:<5}  {lost:<15}  "
            f"{row['verdict']:<7}  {row['seconds']:<5.1f}  {row['grid_seconds'] or float('nan'):.1f}"
        )
    lines.append(f"the promise held in {len(held)} of {len(found)} seeds in which one was made ({len(rows)} in all)")
    ratios = [row["seconds"] / row["grid_seconds"] for row in rows if row["grid_seconds"]]
    if ratios:
        what = "processor time of search, final run and confirmation over that of the grid alone"
        lines.append(f"{what}: median {median(ratios):.2f} of {len(ratios)} seeds")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="of the seeds, to share them out among processes")
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--grid-seeds", type=int, default=10, help="the first so many get the grid too")
    parser.add_argument("--halves", action="store_true", help="choose by one half of the test digits")
    parser.add_argument("--confidence", type=float, default=0.95, help="0.5 goes by the figures alone")
    parser.add_argument("--network", choices=("demo", *NETWORKS), default="demo")
    parser.add_argument("--data", help="folder of CIFAR-10 or SST-2")
    parser.add_argument("--cache", type=Path, default=Path("runs/trained"), help="where trained networks lie")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[MaxDropRow] = json.loads(asked.out.read_text()) if asked.out.exists() else []
    for seed in range(asked.first, asked.seeds):
        if seed in [row["seed"] for row in rows]:
            continue
        rows.append(one_seed(seed, asked))
        atomic_write(asked.out, json.dumps(rows, indent=1))
        print(rows[-1], flush=True)
    print(table(rows, asked.max_drop))


if __name__ == "__main__":
    main()
