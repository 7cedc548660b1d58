"""What each part of the proof costs, in forward passes of the original on the example.

    python benchmarks/proof_cost.py [--models resnet50 vit bert] [--rounds 5] [--batch 1] [--proof default]

Models as in structure.py: transformers configurations with random weights, float32, one thread. A plan of 30 %
sparsity is made, and the cut proved once to warm up; then rounds of a forward pass, a whole proof and another forward
pass follow each other. Printed are medians over the rounds of the processor time of this process, as ratios to the mean
of the two forward passes beside each proof. What is printed for a part is the time inside it; "rest" is what none of
them covers. Parts are timed by wrapping functions of the package, so this file follows their names.
Needs: pip install secateur[hf]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import secateur as sc
from secateur.kinds import trials
from secateur.kinds.slices import kind
from structure import RATIO, build, forward

clock = time.process_time
Times = dict[str, float]


def timed(work: Callable[..., Any], name: Callable[..., str], into: Times) -> Callable[..., Any]:
    """A function that adds up its time under a name."""

    def run(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return work(*args, **kwargs)
        finally:
            into[name(*args, **kwargs)] += clock() - started

    return run


@contextmanager
def parts(into: Times) -> Iterator[None]:
    """Time the parts of a proof."""

    def what(who: str) -> Callable[..., str]:
        def name(self: Any, given: Any, mode: str = "eval", *more: Any, **named: Any) -> str:
            return f"{who} on {given.what}{', training' if mode == 'train' else ''}"

        return name

    own = trials._Trials
    with (
        mock.patch.object(own, "_expected", timed(own._expected, what("original without the units"), into)),
        mock.patch.object(own, "_answer_of_cut", timed(own._answer_of_cut, what("cut model"), into)),
        mock.patch.object(kind, "ablated", timed(kind.ablated, lambda *a, **k: "copy without the units", into)),
        mock.patch.object(kind, "certify", timed(kind.certify, lambda *a, **k: "replay on the example", into)),
    ):
        yield


def measure(name: str, rounds: int, batch: int, proof: str) -> None:
    """Print one model."""
    model, x = build(name)
    x = x.repeat(batch, *[1] * (x.dim() - 1))
    plan = sc.plan(model, x, target={"sparsity": RATIO}, proof=proof)
    cut = plan.edit.copy(model)
    assert plan.evidence is not None
    certify, run = plan.evidence.certify, forward(model, x)
    ratios: dict[str, list[float]] = defaultdict(list)
    seconds = []
    for number in range(rounds + 1):
        found: Times = defaultdict(float)
        times = []
        for work in (run, lambda: certify(model, cut), run):
            started = clock()
            with parts(found):
                work()
            times.append(clock() - started)
        one = (times[0] + times[2]) / 2
        if number:  # the first round warms up
            seconds.append(one)
            found["rest"] = times[1] - sum(found.values())
            for part, value in {**found, "whole proof": times[1]}.items():
                ratios[part].append(value / one)
    certificate = certify(model, cut)
    print(f"{name}, batch {batch}: forward pass {statistics.median(seconds):.3f} s; {len(certificate.trials)} trials")
    for part, values in ratios.items():
        print(f"  {statistics.median(values):5.2f}  {part}")
    print("", *certificate.notes, sep="\n  note: ", flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=("resnet50", "vit", "bert"))
    parser.add_argument("--batch", type=int, default=1, help="samples in the example")
    parser.add_argument("--proof", default="default", choices=["example", "default", "full"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        measure(name, args.rounds, args.batch, args.proof)


if __name__ == "__main__":
    main()
