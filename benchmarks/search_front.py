"""Does a search find a better front than recipes that need none? ResNet-20 on CIFAR-10, at equal recovery.

    python benchmarks/search_front.py --data PATH_TO_CIFAR10 --cache runs/trained --out runs/search_front
        [--seeds 3] [--minutes 20 | --trials 40] [--granularity element] [--steps 60] [--read 5000]
    python benchmarks/search_front.py --out runs/search_front --only table

The network is that of trained.py. Every recipe that is compared gets the same recovery: batch norm of 10 batches, then
`--steps` steps of SGD on batches of 128. Beside the search (TPE over criterion, allocation or scope, and amount) stand
recipes that need none, at six amounts each: of single weights the smallest of all layers together ("global
magnitude"), of each layer alone ("uniform") and by ERK; of channels global and uniform.

A seed divides the images that the network has not seen: one half is what the search chooses by. The front that it
found, and every other recipe, is then made again and read on the other half, so that nothing is said of images by which
anything was chosen. The hypervolume is that of accuracy and of what is left (nonzero weights, or multiply-accumulates),
up to an accuracy of 10 % and all of the model: 0.9 would be a model of no size without an error. Rows of recipes that
were read lie in OUT and are not read again; the study goes on where it stopped, until it has `--trials`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TypedDict

import torch

from compare_cifar10 import BATCH
from secateur.asking import Asked
from secateur.comparison.significance import paired
from secateur.files.seeds import seed_everything
from secateur.model.door import enter
from secateur.objective.evaluate import Objective
from secateur.objective.selection import Selection
from secateur.recipe import dump_recipe, load_recipe
from secateur.recipe.reader import read_yaml
from secateur.search.front import Goals, Values, hypervolume
from secateur.search.study import SearchResult, search
from trained import Trained, resnet20

SEARCHED = "search"
LEFT = {"element": "nonzero", "channel": "macs"}  # what is left, as a share
AMOUNTS = {"element": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98), "channel": (0.85, 0.7, 0.55, 0.4, 0.3, 0.2)}
WORST = {"accuracy": 0.1}
BASELINES: dict[str, dict[str, dict[str, object]]] = {
    "element": {
        "global magnitude": {"criterion": "magnitude", "allocation": "global"},
        "uniform": {"criterion": "magnitude", "allocation": "uniform"},
        "erk": {"criterion": "magnitude", "allocation": "erk"},
    },
    "channel": {
        "global magnitude": {"criterion": {"name": "magnitude", "norm": "l2", "reduce": "mean"}},
        "uniform": {"criterion": "magnitude", "allocation": "uniform"},
    },
}
SPACES: dict[str, dict[str, object]] = {
    "element": {
        "criterion": ["magnitude", "taylor", "wanda", {"name": "taylor", "reduce": "squared"}],
        "allocation": ["global", "uniform", "erk", "lamp"],
        "target.sparsity": {"low": 0.4, "high": 0.98},
    },
    "channel": {
        "criterion": [{"name": "magnitude", "norm": "l2", "reduce": "mean"}, "magnitude", "taylor", "bn-scale"],
        "allocation": ["global", "uniform"],
        "target.macs": {"low": 0.15, "high": 0.9},
    },
}


class Read(TypedDict):
    """One recipe, read on the half by which nothing was chosen."""

    seed: int
    method: str
    recipe: str
    accuracy: float
    left: float
    seconds: float


class Bench:
    """One seed.

    Args:
        seed: of halves, orders and sampler.
        asked: the command line.
    """

    def __init__(self, seed: int, asked: argparse.Namespace) -> None:
        self.seed, self.asked = seed, asked
        self.found: Trained = resnet20(asked.data, asked.cache, seed)
        self.parts = self.found.parts(seed, asked.read)
        self.path = asked.out / f"rows-{asked.granularity}.jsonl"

    @property
    def base(self) -> dict[str, object]:
        """What all recipes share."""
        word = "sparsity" if self.asked.granularity == "element" else "macs"
        sgd = {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
        trained = {"method": "finetune", "steps": self.asked.steps, "optimizer": sgd, "schedule": "cosine"}
        return {
            "granularity": self.asked.granularity, "target": {word: 0.5}, "seed": self.seed,
            "recover": [{"method": "bn_refresh", "batches": 10}, trained],
        }  # fmt: skip

    @cached_property
    def objective(self) -> Objective:
        """Scores and recovers as the search does, and reads the other half."""
        given = enter(self.parts)
        asked = Asked(
            self.found.net, given.example(), (), given, load_recipe(self.base), None, {}, None, None, None, "", ""
        )
        assert given.test is not None
        return Objective(asked, reach=Selection(given.test, given, "the half that nothing was chosen by"))

    def searched(self) -> SearchResult:
        """The study, gone on with until it has had its time or its trials."""
        storage = self.asked.out / f"study-{self.asked.granularity}-{self.seed}.db"
        left = self.asked.trials
        if left is not None and storage.exists():
            done = self.asked.out / f"done-{self.asked.granularity}-{self.seed}"
            left -= int(done.read_text()) if done.exists() else 0
        found = search(
            self.found.net, data={"train": self.parts["train"], "calibration": self.parts["calibration"]},
            space={"base": self.base, **SPACES[self.asked.granularity]},
            objectives=["accuracy", LEFT[self.asked.granularity]], storage=storage, seed=self.seed,
            minutes=None if left is not None else self.asked.minutes, trials=max(left, 1) if left is not None else None,
        )  # fmt: skip
        (self.asked.out / f"done-{self.asked.granularity}-{self.seed}").write_text(str(len(found.values)))
        print(f"seed {self.seed}: {found!r}, {found.states}", flush=True)
        return found

    def run(self) -> None:
        """Baselines, then the front of the search."""
        for method, choice in BASELINES[self.asked.granularity].items():
            for amount in AMOUNTS[self.asked.granularity]:
                word = next(iter(load_recipe(self.base).target.given()))
                self.read(method, dump_recipe(load_recipe({**self.base, **choice, "target": {word: amount}})))
        found = self.searched()
        for number in found.front:
            self.read(SEARCHED, found.recipes[number])

    def read(self, method: str, recipe: str) -> None:
        """One row, unless it is there."""
        if any((row["seed"], row["method"], row["recipe"]) == (self.seed, method, recipe) for row in rows(self.path)):
            return
        started, settings = time.process_time(), load_recipe(read_yaml(recipe, "a recipe of the study").data)
        with seed_everything(settings.seed):
            found = self.objective.evaluate(settings)
        row: Read = {
            "seed": self.seed, "method": method, "recipe": recipe, "accuracy": found.figure,
            "left": found.shares[LEFT[self.asked.granularity]], "seconds": time.process_time() - started,
        }  # fmt: skip
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({**row, "recipe": settings.target.given()}, flush=True)


def rows(path: Path) -> list[Read]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def volumes(found: list[Read]) -> dict[str, dict[int, float]]:
    """Method -> seed -> hypervolume."""
    goals = Goals(("accuracy", "left"), frozenset({"accuracy"}))
    volume: dict[str, dict[int, float]] = {}
    for method in dict.fromkeys(row["method"] for row in found):
        for seed in sorted({row["seed"] for row in found if row["method"] == method}):
            points: list[Values] = [
                {"accuracy": row["accuracy"], "left": row["left"]}
                for row in found if (row["method"], row["seed"]) == (method, seed)
            ]  # fmt: skip
            volume.setdefault(method, {})[seed] = hypervolume(points, goals, {**WORST, "left": 1.0})
    return volume


def beaten(found: list[Read], method: str) -> Iterator[str]:
    """Where the front of the search does not dominate: points of a method that no point of it equals or beats."""
    own = [row for row in found if row["method"] == SEARCHED]
    for row in (row for row in found if row["method"] == method):
        same = [one for one in own if one["seed"] == row["seed"] and one["left"] <= row["left"] + 5e-4]
        best = max((one["accuracy"] for one in same), default=None)
        if best is None or best < row["accuracy"]:
            said = "nothing as small" if best is None else f"{100 * (row['accuracy'] - best):.2f} points below"
            yield f"seed {row['seed']}, {row['left']:.3f} left: {said}"


def table(path: Path) -> str:
    """Hypervolumes, differences seed by seed, and where the search is not better."""
    found = rows(path)
    volume = volumes(found)
    lines = ["| recipes | hypervolume, mean (seeds) | search minus it, mean and 95 % interval |", "|---|---|---|"]
    for method, of in volume.items():
        beside = "" if method == SEARCHED else _difference(volume.get(SEARCHED, {}), of)
        each = ", ".join(f"{value:.4f}" for value in of.values())
        lines.append(f"| {method} | {fmean(of.values()):.4f} ({each}) | {beside} |")
    for method in volume:
        if method != SEARCHED:
            lines += ["", f"not beaten, {method}:", *(f"- {said}" for said in beaten(found, method))]
    return "\n".join(lines)


def _difference(these: Mapping[int, float], those: Mapping[int, float]) -> str:
    found = paired(these, those)
    if not found.pairs:
        return "-"
    return f"{found.mean:+.4f}" + ("" if found.half is None else f" ± {found.half:.4f}") + f" ({found.pairs} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train.parquet and test.parquet")
    parser.add_argument("--cache", type=Path, default=Path("runs/trained"))
    parser.add_argument("--out", type=Path, default=Path("runs/search_front"))
    parser.add_argument("--granularity", choices=list(LEFT), default="element")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=20.0, help="of each search, by the clock")
    parser.add_argument("--trials", type=int, help="in the place of minutes, for a machine that is not quiet")
    parser.add_argument("--steps", type=int, default=60, help=f"of every recovery, batches of {BATCH}")
    parser.add_argument("--read", type=int, default=5000, help="images of each half")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("all", "table"), default="all")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.only == "all":
        for seed in range(asked.seeds):
            Bench(seed, asked).run()
    print(table(asked.out / f"rows-{asked.granularity}.jsonl"))


if __name__ == "__main__":
    main()
